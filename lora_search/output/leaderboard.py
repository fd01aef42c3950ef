"""The leaderboard in a terminal: complete columns at any width, with ties."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_search.output.slot_table import measured, plain_table
from lora_search.results.formatting import (
    short_names,
    show_value,
)
from lora_search.results.ranking import ranked
from lora_search.results.record import StudyRecord
from lora_search.results.verdict import (
    board,
    metric_line,
    split_keys,
    tied_line,
)
from lora_search.trial import TrialRow

STATE_STYLES = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan", "WAITING": "dim"}
NARROW_TRIALS = 6  # trials whose settings are shown as columns where rows are too long


def leaderboard(record: StudyRecord, width: int, limit: int = 20) -> RenderableType:
    """Return the base model and the best ``limit`` trials, lowest perplexity first, with their settings.

    Settings that all trials share are said once. Where the others do not fit beside the results they follow
    in a table of their own, a row each.
    """
    rows = record.rows
    varying, same = split_keys(rows)
    whole = results_table(record, limit, varying)
    if measured(whole).maximum <= width:
        parts: list[RenderableType] = [whole]
    else:
        parts = [results_table(record, limit, [])]
        parts += _settings_tables(ranked(rows)[:NARROW_TRIALS], varying, width)
    shared = ", ".join(f"{key} {show_value(value)}" for key, value in same.items())
    alike = f"the same in all trials: {shared}" if shared else ""
    notes = [alike, tied_line(rows, record.certainty), metric_line(rows)]
    left_out = len(ranked(rows)) - limit
    notes += [f"{left_out} more trials in the report"] if left_out > 0 else []
    return Group(*parts, *(Text(note, style="dim") for note in notes if note))


def results_table(record: StudyRecord, limit: int, keys: Sequence[str]) -> Table:
    table, (heads, lines) = plain_table("Leaderboard"), board(record, keys, short_names(keys))
    for head in heads:
        table.add_column(head, justify="left" if head == "state" else "right", no_wrap=True)
    for row, cells in lines[: limit + 1]:  # the base first
        style = "bold" if row is None else "bold green" if row is record.best else ""
        state = Text(cells[-1], style="" if row is None else STATE_STYLES.get(row.state, ""))
        table.add_row(*map(Text, cells[:-1]), state, style=style)
    return table


def _settings_tables(best: Sequence[TrialRow], keys: Sequence[str], width: int) -> list[RenderableType]:
    """Return settings as rows and trials as columns, as many as fit the width, at least one."""
    for count in range(len(best), 0, -1):
        table = plain_table(f"Settings of the best {count}" if count > 1 else "Settings of the best")
        table.add_column("", no_wrap=True)
        for row in best[:count]:
            table.add_column(f"trial {row.number}", justify="right", no_wrap=True)
        for key in keys:
            values = [Text(show_value(row.params[key])) if key in row.params else "" for row in best[:count]]
            table.add_row(key, *values)
        if count == 1 or measured(table).maximum <= width:
            return ["", table]
    return []
