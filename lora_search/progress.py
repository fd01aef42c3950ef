"""What a person sees: a live view in a terminal, plain lines elsewhere; the leaderboard and what to type next."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from lora_search.trial import SlotView, StudySummary, TrialRow

PLAIN_SECONDS = 30.0  # between status lines outside a terminal


def _console() -> Console:
    """Return standard output; wide where no terminal sets a width."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


class Progress:
    """Context manager around a sweep; all printing goes through it."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _console()
        self._live: Live | None = None
        self._start = time.monotonic()
        self._last_line = 0.0

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def event(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(f"[dim]{_clock(time.monotonic() - self._start)}[/dim] {escape(text)}")

    def update(self, slots: Sequence[SlotView], summary: StudySummary, tokens_per_second: float) -> None:
        """Show where the sweep stands; cheap enough for every pass."""
        elapsed = time.monotonic() - self._start
        headline = _headline(summary, tokens_per_second, elapsed)
        if self._live is not None:
            self._live.update(Group(headline, _slot_table(slots)))
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.event(headline)


def _headline(summary: StudySummary, tokens_per_second: float, elapsed: float) -> str:
    best = (
        ""
        if summary.best_perplexity is None
        else f", best {summary.best_perplexity:.3f} (trial {summary.best_number})"
    )
    left = ""
    if 0 < summary.finished < summary.n_trials:
        left = f", about {_clock(elapsed / summary.finished * (summary.n_trials - summary.finished))} left"
    done = f"{summary.finished}/{summary.n_trials} trials done ({summary.pruned} pruned)"
    return f"{done}{best}, {tokens_per_second:.0f} tokens/s, {_clock(elapsed)} gone{left}"


def _slot_table(slots: Sequence[SlotView]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("trial", "r", "alpha", "lr", "batch", "targets", "rung", "examples", "loss", "perplexity"):
        table.add_column(name, justify="left" if name == "targets" else "right", no_wrap=True)
    for view in slots:
        s = view.settings
        table.add_row(
            str(view.trial_number), str(s.r), f"{s.alpha:g}", f"{s.lr:.2g}", str(s.examples_per_step),
            _short_targets(s.target_modules), f"{view.rung}/{s.num_rungs}",
            f"{view.examples_seen}/{view.next_rung_examples}",
            "" if view.loss is None else f"{view.loss:.3f}",
            "" if view.perplexity is None else f"{view.perplexity:.3f}",
        )  # fmt: skip
    return table


def _short_targets(targets: tuple[str, ...]) -> str:
    return ",".join(target.removesuffix("_proj") for target in targets)


def leaderboard(rows: Sequence[TrialRow], base_perplexity: float) -> Table:
    """Return the base model and then the trials, best first."""
    keys = sorted({key for row in rows for key in row.params})
    table = Table(title="Validation perplexity", title_justify="left", pad_edge=False)
    for name in ("trial", "perplexity", "gain", "rung", *keys, "state", "why"):
        table.add_column(
            name, justify="right" if name in ("trial", "perplexity", "gain", "rung", *keys) else "left"
        )
    table.add_row("base", f"{base_perplexity:.3f}", "", "", *("" for _ in keys), "", "the model as it is")
    for row in ranked(rows):
        shown = "-" if row.perplexity is None else f"{row.perplexity:.3f}"
        gain = "-" if row.perplexity is None else f"{1 - row.perplexity / base_perplexity:.1%}"
        params = (escape(format_value(row.params.get(key, ""))) for key in keys)
        best = str(row.best_rung or "")
        table.add_row(str(row.number), shown, gain, best, *params, row.state, escape(row.reason))
    return table


def ranked(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials, COMPLETE before the rest, by perplexity."""
    return sorted(
        rows, key=lambda r: (r.state != "COMPLETE", r.perplexity is None, r.perplexity or 0.0, r.number)
    )


def format_value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def next_steps(places: Mapping[str, str]) -> str:
    """Return the lines to type next, one per place."""
    width = max(map(len, places))
    return "\n".join(f"  {name:<{width}}  {command}" for name, command in places.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
