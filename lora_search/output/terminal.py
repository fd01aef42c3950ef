"""The output for people: a live view in a terminal, plain lines elsewhere; the next commands.

No other module prints.
"""

import io
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    Group,
    RenderableType,
    RenderHook,
    RenderResult,
)
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lora_search.output.log_file import LogFile
from lora_search.output.progress_bar import Bar
from lora_search.output.slot_table import rungs_trained, slot_table
from lora_search.output.streams import clean, shorten
from lora_search.results.formatting import show_perplexity, show_seconds
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.settings.secrets import redact
from lora_search.trial import SlotView, StudySummary

T = TypeVar("T")
LIVE_SECONDS = 0.5  # the live view is drawn at most so often
LINE_SECONDS = 30.0  # and a plain status line printed at most so often
PLAIN_WIDTH = 140  # of tables that go to a file

DASHBOARD_FILES = ".dashboard"  # in runs_dir
LIMITS = ("n_trials", "max_hours", "max_tokens", "max_cost")  # of a study: the first that is reached ends it


def open_console() -> Console:
    """Return the console of standard output; a file gets wide tables and no colours."""
    console = Console(highlight=False)
    if not console.file.isatty():
        console = Console(highlight=False, width=PLAIN_WIDTH, force_terminal=False)
    console.push_render_hook(CleanPrints())
    return console


class CleanPrints(RenderHook):
    """Escapes control sequences in names, messages and data."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [Clean(renderable) for renderable in renderables]


class Clean:
    """Draws something, with the control characters in its texts shown as escapes."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            is_ours = segment.control is not None  # the cursor, moved by rich
            yield segment if is_ours else Segment(clean(segment.text), segment.style)


class Progress:
    """The terminal during one sweep. As a context it shows the live view and the program's own warnings."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or open_console()
        self._clock = clock
        self._started = clock()
        self.began = time.time()  # of the process, nearly: the budget counts from here
        self._drawn = float("-inf")
        self._time_left = TimeLeft()
        self._live: Live | None = None
        self.searched: Sequence[str] = ()  # the keys that the live view shows
        self.log = LogFile()
        self._logged = float("-inf")
        self._relay = WarningRelay(self)

    def __enter__(self) -> "Progress":
        if self.console.is_interactive:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._relay.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._relay.detach()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def event(self, text: str) -> None:
        """Print a permanent line: a step of the set-up, a trial that was pruned, finished or failed."""
        elapsed = Text(f"[{show_seconds(self._clock() - self._started):>5}] ", style="dim")
        self.log.write(f"{elapsed}{text}")
        self.console.print(
            elapsed + Text(clean(shorten(redact(text)))), soft_wrap=not self.console.is_interactive
        )

    def events(self, lines: Iterable[str]) -> None:
        """Print a permanent line for each."""
        for line in lines:
            self.event(line)

    def refuse(self, error: Exception) -> None:
        """Print the one message that ends a command."""
        self.log.write(str(error))
        self.console.print(Text(clean(shorten(redact(str(error)))), style="red"), soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or a text permanently."""
        self.console.print(renderable, markup=False, soft_wrap=isinstance(renderable, str))
        plain = Console(file=io.StringIO(), width=PLAIN_WIDTH, force_terminal=False, highlight=False)
        plain.print(renderable, markup=False, soft_wrap=isinstance(renderable, str))
        assert isinstance(plain.file, io.StringIO)
        self.log.write(plain.file.getvalue())

    def wait(self, text: str) -> None:
        """Print at intervals why nothing happens."""
        if self._clock() - self._drawn >= LINE_SECONDS:
            self._drawn = self._clock()
            self.event(text)

    def watch(self, items: Iterable[T], doing: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, and show how far it is where it takes long."""
        bar = Bar(self.console, self.event, self._clock, doing, total)
        try:
            for done, item in enumerate(items, start=1):
                yield item
                bar.show(done)
        finally:
            bar.close()

    def update(self, slots: Sequence[SlotView], summary: StudySummary, tokens_per_second: float) -> None:
        """Show the progress of the sweep. Cheap enough for every pass: it draws only at intervals."""
        now = self._clock()
        if now - self._drawn < (LINE_SECONDS if self._live is None else LIVE_SECONDS):
            return
        self._drawn = now
        seconds_left = self._time_left.estimate(now, slots, summary)
        line = status_line(slots, summary, tokens_per_second, seconds_left)
        if self._live is None:
            self.event(line)
        else:
            if now - self._logged >= LINE_SECONDS:
                self._logged = now
                self.log.write(f"[{show_seconds(now - self._started):>5}] {line}")
            head = heading(now - self._started, seconds_left, summary, tokens_per_second)
            table = slot_table(slots, self.searched, self.console.width)
            self._live.update(Clean(Group(head, table)), refresh=True)


class WarningRelay(logging.Handler):
    """Sends the program's own log records through the view, so that they never tear it."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(level=logging.WARNING)
        self._progress = progress
        self._logger = logging.getLogger("lora_search")

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.event(f"{record.levelname.lower()}: {record.getMessage()}")

    def attach(self) -> None:
        self._logger.addHandler(self)
        self._logger.propagate = False

    def detach(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True


class TimeLeft:
    """Estimates the time left from the rungs trained so far; as many trials are expected to be pruned."""

    def __init__(self) -> None:
        self._started = 0.0
        self._first: dict[int, float] = {}  # trial -> rungs when it was first seen here (a resumed one: > 0)
        self._last: dict[int, float] = {}

    def estimate(self, now: float, slots: Sequence[SlotView], summary: StudySummary) -> float | None:
        """Return seconds, or None until one rung's worth has been trained."""
        if not self._first:
            self._started = now
        for slot in slots:
            self._first.setdefault(slot.trial_number, rungs_trained(slot))
            self._last[slot.trial_number] = rungs_trained(slot)
        done = sum(self._last[number] - self._first[number] for number in self._last)
        if done < 1 or not slots or summary.n_trials is None:
            return None
        workers = max(1.0, summary.running / len(slots))  # others train on the same study
        return self._rungs_left(slots, summary) * (now - self._started) / (done * workers)

    def _rungs_left(self, slots: Sequence[SlotView], summary: StudySummary) -> float:
        busy = {slot.trial_number for slot in slots}
        lengths = [rungs for number, rungs in self._last.items() if number not in busy]
        longest = max(slot.settings.num_rungs for slot in slots)
        usual = sum(lengths) / len(lengths) if lengths else float(longest)
        assert summary.n_trials is not None
        waiting = max(0, summary.n_trials - summary.finished - max(summary.running, len(slots)))
        running = 0.0
        for slot in slots:
            rungs = rungs_trained(slot)
            running += (usual if rungs < usual else slot.settings.num_rungs) - rungs
        return waiting * usual + running


def heading(
    elapsed: float, seconds_left: float | None, summary: StudySummary, tokens_per_second: float
) -> RenderableType:
    """Return the study's best, the clock and the bar."""
    left = f", about {show_seconds(seconds_left)} left" if seconds_left is not None else ""
    first = Table.grid(expand=True)
    first.add_column()
    first.add_column(justify="right", no_wrap=True)
    first.add_row(best_line(summary), Text(f"{show_seconds(elapsed)}{left}", style="dim"))
    bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    counts = Text(trials_done(summary))
    counts.append(f"  {summary.pruned} pruned", style="yellow")
    if summary.failed:
        counts.append(f"  {summary.failed} failed", style="red")
    counts.append(f"  {tokens_per_second:,.0f} tokens/s", style="cyan")
    bar.add_row(ProgressBar(total=1.0, completed=share_done(summary)), counts)
    return Padding(Group(first, bar), (1, 0))


def trials_done(summary: StudySummary) -> str:
    """Return finished and requested trials, and how much of each limit is spent."""
    total = "" if summary.n_trials is None else f"/{summary.n_trials}"
    return ", ".join([f"{summary.finished}{total} trials", *(str(limit) for limit in summary.limits)])


def share_done(summary: StudySummary) -> float:
    """Return the progress toward the limit that ends the sweep first."""
    trials = [] if summary.n_trials is None else [summary.finished / summary.n_trials]
    return min(1.0, max([*trials, *(limit.share for limit in summary.limits)], default=0.0))


def best_line(summary: StudySummary) -> Text:
    """Return the best perplexity so far."""
    if summary.best_number is None:
        return Text("no trial is complete yet", style="dim")
    line = Text(f"best perplexity {show_perplexity(summary.best_perplexity)}", style="bold green")
    return line.append(f" (trial {summary.best_number})", style="not bold")


def status_line(
    slots: Sequence[SlotView], summary: StudySummary, tokens_per_second: float, seconds_left: float | None
) -> str:
    """Return the progress of the sweep in one plain line."""
    parts = [trials_done(summary), f"{summary.pruned} pruned"]
    if summary.failed:
        parts.append(f"{summary.failed} failed")
    if summary.best_number is not None:
        parts.append(f"best {show_perplexity(summary.best_perplexity)} (trial {summary.best_number})")
    parts.append(f"{tokens_per_second:,.0f} tokens/s")
    if seconds_left is not None:
        parts.append(f"about {show_seconds(seconds_left)} left")
    running = [
        f"trial {s.trial_number} rung {s.rung}/{s.settings.num_rungs} {show_perplexity(s.perplexity)}"
        for s in slots
    ]
    return " | ".join([", ".join(parts), *running])


def next_steps(config: SweepConfig, folder: Path, best: str, go_on: str | None = None) -> str:
    """Return the paths of the results and the next commands, as they work in this shell.

    ``go_on`` is how to continue an unfinished sweep; None if it needs higher limits.
    """
    own = "data=jsonl data.path=my.jsonl study.name=mine"
    runs, files = shlex.quote(str(folder)), shlex.quote(str(folder.parent / DASHBOARD_FILES))
    storage = shlex.quote(redact(config.study.storage))
    by_make = "MAKELEVEL" in os.environ  # make sets it for what it starts
    steps = {
        "report": f"{folder}/report.html",
        "best adapter": best,
        "dashboard": " ".join([program("optuna-dashboard"), "--artifact-dir", files, storage]),
        "W&B": f"{program('wandb')} sync {runs}/wandb/offline-run-* {runs}/trials/*/wandb/offline-run-*",
        "more trials": go_on or f"the same command with {' '.join(higher_limits(config.study))}",
        "your own data": f"make sweep ARGS='{own}'" if by_make else f"{python()} -m lora_search.sweep {own}",
    }
    if config.tracker.name != "wandb_offline":
        del steps["W&B"]
    width = max(map(len, steps))
    return "\n".join(f"  {name:<{width}}  {step}" for name, step in steps.items())


def higher_limits(study: StudyConfig) -> list[str]:
    """Return overrides that let a finished sweep continue."""
    keys = [key for key in LIMITS if getattr(study, key) is not None]
    return [f"study.{key}={getattr(study, key) * 2}" for key in keys]


def program(name: str) -> str:
    """Return how to call a program from this Python's folder: its name if that works, else its path."""
    beside = Path(sys.executable).parent / name
    if not beside.exists() or shutil.which(name) == str(beside):
        return name
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def python() -> str:
    return "python" if shutil.which("python") == sys.executable else program(Path(sys.executable).name)
