"""The verdict in words: ties with the best, the test score, the settings that differ. Pure."""

import math
from collections.abc import Sequence

from lora_search.results.certainty import SURE, Certainty
from lora_search.results.formatting import show_change, show_difference, show_perplexity, show_value
from lora_search.results.ranking import best_of, ranked, searched_keys
from lora_search.results.record import StudyRecord
from lora_search.study.stored_results import FinalAdapter, TestScore
from lora_search.trial import TrialRow

OUT_OF_REACH = 100_000  # validation rows that nobody has


def split_keys(rows: Sequence[TrialRow]) -> tuple[list[str], dict[str, object]]:
    """Return the searched keys that differ between trials, and the values of those that do not. A key that
    only some trials have differs."""
    keys = searched_keys(rows)
    drawn = [row.params for row in rows if row.params]  # a trial that waits may have none yet
    values = {key: [params.get(key, ...) for params in drawn] for key in keys}
    same = {key: found[0] for key, found in values.items() if len(set(map(repr, found))) == 1 < len(rows)}
    return [key for key in keys if key not in same], same


def state_of(row: TrialRow, certainty: Certainty) -> str:
    """Return the state for display: a complete trial may be tied with the best."""
    return f"{row.state.lower()}, tied" if certainty.is_tied(row) else row.state.lower()


def tied_line(rows: Sequence[TrialRow], certainty: Certainty) -> str:
    """Return the trials tied with the best, and how many rows would separate them; empty without ties."""
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


def metric_line(rows: Sequence[TrialRow]) -> str:
    """Return what the metric of the generated answers says; nothing where none was scored."""
    scored = [(row, row.metric) for row in rows if row.metric is not None]
    if not scored:
        return ""
    best, top = max(scored, key=lambda pair: (pair[1].score, -pair[0].number))
    text = f"{top.name} of the answers to {top.num_rows} validation rows: trial {best.number} {top.score:.1f}"
    tied = [str(row.number) for row, m in scored if m.behind and m.behind[0] <= SURE * m.behind[1]]
    verb = "is" if len(tied) == 1 else "are"
    is_tied = f"; {listed(tied)} {verb} tied with it, within two paired standard errors" if tied else ""
    chooses = "; it chooses the winner" if top.chooses else ""
    return f"{text}, base {top.base:.1f}{is_tied}{chooses}"


def metric_name(rows: Sequence[TrialRow]) -> str:
    """Return what the column of the metric is called; nothing where no answers were scored."""
    return next((row.metric.name.rpartition(".")[2] for row in rows if row.metric is not None), "")


def metric_base(rows: Sequence[TrialRow]) -> list[str]:
    """Return the base's score in the column of the metric; nothing where there is no such column."""
    return [f"{row.metric.base:.1f}" for row in rows if row.metric is not None][:1]


def metric_text(row: TrialRow) -> str:
    """Return the trial's score in the column of the metric."""
    return "" if row.metric is None else f"{row.metric.score:.1f}"


def board(
    record: StudyRecord, keys: Sequence[str], names: Sequence[str]
) -> tuple[list[str], list[tuple[TrialRow | None, list[str]]]]:
    """Return the leaderboard as text: heads, and the cells of the base (None) and of each trial, the best
    first. ``names``: what the settings ``keys`` are called."""
    rows, certainty, places = record.rows, record.certainty, record.places
    against = ["against best"] if certainty.against_best else []
    metric = [name] if (name := metric_name(rows)) else []
    heads = ["trial", "perplexity", "change", *against, *names, *metric, "rungs", "state"]
    blanks = ["" for _ in (*against, *keys)]
    base = ["-", show_perplexity(record.base, places), "", *blanks, *metric_base(rows), "", "base model"]
    lines: list[tuple[TrialRow | None, list[str]]] = [(None, base)]
    for row in ranked(rows):
        to_base, to_best = certainty.against_base.get(row.number), certainty.against_best.get(row.number)
        lines.append((row, [
            str(row.number),
            show_perplexity(row.perplexity, places),
            show_change(record.base, row.perplexity, to_base.change_error if to_base else 0.0),
            *([show_difference(to_best.change, to_best.change_error) if to_best else ""] if against else []),
            *(show_value(row.params[key]) if key in row.params else "" for key in keys),
            *([metric_text(row)] if metric else []),
            str(len(row.perplexities)),
            state_of(row, certainty),
        ]))  # fmt: skip
    return heads, lines


def line_of_final(final: FinalAdapter) -> str:
    """Return what a final adapter is, in a line."""
    rows = f"{final.num_rows:,} rows ({listed(final.splits)})"
    return (
        f"final adapter in {final.folder}: the settings of trial {final.trial}, trained on {rows}, "
        f"epochs {final.epochs:g}; it has no score of its own"
    )


def rows_in_words(number: int) -> str:
    """Return 1,234, or that it is out of reach."""
    return f"{number:,}" if number <= OUT_OF_REACH else f"more than {OUT_OF_REACH:,}"


def listed(names: Sequence[str]) -> str:
    """Return 3, or 3 and 5, or 3, 5 and 9."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
