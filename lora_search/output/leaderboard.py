"""The leaderboard in a terminal: every column whole at any width, and who is tied with the best."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lora_search.output.certainty import Certainty
from lora_search.output.formatting import (
    short_names,
    show_change,
    show_difference,
    show_perplexity,
    show_value,
)
from lora_search.output.ranking import best_of, ranked, searched_keys
from lora_search.study.results import TestScore
from lora_search.trial import TrialRow

STATE_STYLES = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan", "WAITING": "dim"}
OUT_OF_REACH = 100_000  # validation rows that nobody has
NARROW_TRIALS = 6  # trials whose settings are shown as columns where rows are too long


def leaderboard(
    rows: Sequence[TrialRow],
    base_perplexity: float,
    certainty: Certainty,
    width: int,
    limit: int = 20,
) -> RenderableType:
    """Return the base model and the best ``limit`` trials, lowest perplexity first, with what was searched.

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
    notes = [same_line(same), tied_line(rows, certainty)]
    left_out = len(ranked(rows)) - limit
    notes += [f"{left_out} more trials in the report"] if left_out > 0 else []
    return Group(*parts, *(Text(note, style="dim") for note in notes if note))


def split_keys(rows: Sequence[TrialRow]) -> tuple[list[str], dict[str, object]]:
    """Return the searched keys that differ between trials, and the values of those that do not."""
    keys = searched_keys(rows)
    values = {key: [row.params[key] for row in rows if key in row.params] for key in keys}
    same = {key: found[0] for key, found in values.items() if len(set(map(repr, found))) == 1 < len(rows)}
    return [key for key in keys if key not in same], same


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
    table.add_column("rungs", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    places = certainty.decimals(best.perplexity) if best and best.perplexity else None
    blanks = ["" for _ in keys] + ([""] if certainty.against_best else [])
    table.add_row("-", show_perplexity(base_perplexity, places), "", *blanks, "", "base model", style="bold")
    for row in ranked(rows)[:limit]:
        style = "bold green" if row is best else ""
        table.add_row(*_cells(row, keys, base_perplexity, certainty, places), style=style)
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


def state_of(row: TrialRow, certainty: Certainty) -> str:
    """Return the state as people read it: a complete trial may be tied with the best."""
    return f"{row.state.lower()}, tied" if certainty.is_tied(row) else row.state.lower()


def same_line(same: Mapping[str, object]) -> str:
    """Return what all trials share, in one line; nothing where that is nothing."""
    listed = ", ".join(f"{key} {show_value(value)}" for key, value in same.items())
    return f"the same in all trials: {listed}" if listed else ""


def tied_line(rows: Sequence[TrialRow], certainty: Certainty) -> str:
    """Return who is as good as the best, and how many rows would tell; nothing where nobody is."""
    tied, best = certainty.tied(ranked(rows)), best_of(rows)
    if not tied or best is None:
        return ""
    comparisons = [certainty.against_best[row.number] for row in tied]
    needed = [c.rows_needed for c in comparisons]
    names = listed([str(row.number) for row in tied])
    verb = "trials {} are" if len(tied) > 1 else "trial {} is"
    beginning = f"{verb.format(names)} tied with trial {best.number}: within two standard errors on "
    numbers = [rows_in_words(number) for number in needed if number is not None]
    rows_needed = f"; about {listed(numbers)} rows would separate them" if numbers else ""
    return f"{beginning}{comparisons[0].num_rows} validation rows{rows_needed}"


def line_of_test(score: TestScore, best: TrialRow | None = None) -> str:
    """Return the test score in a line, and whether it is of another trial than the best by now."""
    to_base = show_difference(math.expm1(score.difference), score.error)
    values = [show_perplexity(value, 2) for value in (score.perplexity, score.base_perplexity)]
    text = f"test split, {score.num_rows} rows: trial {score.trial} {values[0]}, base {values[1]}"
    text += f", change {to_base}"
    if score.looks > 1:
        text += f"; look {score.looks} at it: its value as a test is less with each"
    if best is not None and best.number != score.trial:
        text += f"; the best is trial {best.number} by now (lora-search score --again)"
    return text


def rows_in_words(number: int) -> str:
    """Return 1,234, or that it is out of reach."""
    return f"{number:,}" if number <= OUT_OF_REACH else f"more than {OUT_OF_REACH:,}"


def listed(names: Sequence[str]) -> str:
    """Return 3, or 3 and 5, or 3, 5 and 9."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _settings_tables(best: Sequence[TrialRow], keys: Sequence[str], width: int) -> list[RenderableType]:
    """Return settings as rows and trials as columns, as many as the width holds: at least one."""
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
