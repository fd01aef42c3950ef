"""The leaderboard in a terminal: complete columns at any width, with ties."""

from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lora_search.results.certainty import Certainty
from lora_search.results.formatting import (
    short_names,
    show_change,
    show_difference,
    show_perplexity,
    show_value,
)
from lora_search.results.ranking import best_of, ranked
from lora_search.results.verdict import (
    metric_base,
    metric_line,
    metric_name,
    metric_text,
    split_keys,
    state_of,
    tied_line,
)
from lora_search.trial import TrialRow

STATE_STYLES = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan", "WAITING": "dim"}
NARROW_TRIALS = 6  # trials whose settings are shown as columns where rows are too long


def leaderboard(
    rows: Sequence[TrialRow],
    base_perplexity: float,
    certainty: Certainty,
    width: int,
    limit: int = 20,
) -> RenderableType:
    """Return the base model and the best ``limit`` trials, lowest perplexity first, with their settings.

    Settings that all trials share are said once. Where the others do not fit beside the results they follow
    in a table of their own, a row each.
    """
    varying, same = split_keys(rows)
    whole = results_table(rows, base_perplexity, certainty, limit, varying)
    if _width_of(whole) <= width:
        parts: list[RenderableType] = [whole]
    else:
        parts = [results_table(rows, base_perplexity, certainty, limit, [])]
        parts += _settings_tables(ranked(rows)[:NARROW_TRIALS], varying, width)
    notes = [same_line(same), tied_line(rows, certainty), metric_line(rows)]
    left_out = len(ranked(rows)) - limit
    notes += [f"{left_out} more trials in the report"] if left_out > 0 else []
    return Group(*parts, *(Text(note, style="dim") for note in notes if note))


def results_table(
    rows: Sequence[TrialRow], base_perplexity: float, certainty: Certainty, limit: int, keys: Sequence[str]
) -> Table:
    best = best_of(rows)
    table = _table("Leaderboard")
    for name in ("trial", "perplexity", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    if certainty.against_best:
        table.add_column("against best", justify="right", no_wrap=True)
    for name in short_names(keys):
        table.add_column(name, justify="right", no_wrap=True)
    if metric := metric_name(rows):
        table.add_column(metric, justify="right", no_wrap=True)
    table.add_column("rungs", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    places = certainty.decimals(best.perplexity) if best and best.perplexity else None
    blanks = ["" for _ in keys] + ([""] if certainty.against_best else [])
    blanks += metric_base(rows)
    table.add_row("-", show_perplexity(base_perplexity, places), "", *blanks, "", "base model", style="bold")
    for row in ranked(rows)[:limit]:
        style = "bold green" if row is best else ""
        cells = _cells(row, keys, base_perplexity, certainty, places)
        table.add_row(*cells[:-2], *([metric_text(row)] if metric else []), *cells[-2:], style=style)
    return table


def _cells(
    row: TrialRow, keys: Sequence[str], base_perplexity: float, certainty: Certainty, places: int | None
) -> list[RenderableType]:
    to_base, to_best = certainty.against_base.get(row.number), certainty.against_best.get(row.number)
    against = [show_difference(to_best.change, to_best.change_error) if to_best else ""]
    return [
        str(row.number),
        show_perplexity(row.perplexity, places),
        show_change(base_perplexity, row.perplexity, to_base.change_error if to_base else 0.0),
        *(against if certainty.against_best else []),
        *(Text(show_value(row.params[key])) if key in row.params else "" for key in keys),
        str(len(row.perplexities)),
        Text(state_of(row, certainty), style=STATE_STYLES.get(row.state, "")),
    ]


def same_line(same: Mapping[str, object]) -> str:
    """Return the settings that all trials share, in one line; empty if there are none."""
    listed = ", ".join(f"{key} {show_value(value)}" for key, value in same.items())
    return f"the same in all trials: {listed}" if listed else ""


def _settings_tables(best: Sequence[TrialRow], keys: Sequence[str], width: int) -> list[RenderableType]:
    """Return settings as rows and trials as columns, as many as fit the width, at least one."""
    for count in range(len(best), 0, -1):
        table = _table(f"Settings of the best {count}" if count > 1 else "Settings of the best")
        table.add_column("", no_wrap=True)
        for row in best[:count]:
            table.add_column(f"trial {row.number}", justify="right", no_wrap=True)
        for key in keys:
            values = [Text(show_value(row.params[key])) if key in row.params else "" for row in best[:count]]
            table.add_row(key, *values)
        if count == 1 or _width_of(table) <= width:
            return ["", table]
    return []


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="dim")


def _width_of(table: Table) -> int:
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum
