"""The ranking of trials, the same for screen, report and export. Pure."""

import math
from collections.abc import Mapping, Sequence

from lora_search.errors import StudyError
from lora_search.trial import TrialRow

FINISHED, UNFINISHED = ("COMPLETE", "PRUNED"), ("RUNNING", "WAITING")


def ranked(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials that have begun, lowest perplexity first, those without one last.

    Where a metric chooses, those that it scored come first. An interrupted one is WAITING and has begun.
    """
    started = [row for row in rows if row.state != "WAITING" or row.perplexities]
    return sorted(started, key=merit)


def best_of(rows: Sequence[TrialRow]) -> TrialRow | None:
    """Return the best trial: the lowest perplexity among trials that are complete or may still become so.

    If the study selects by a metric: the complete trial with the highest score, once answers are scored.
    Without such trials, the best pruned one; None if nothing has been measured.
    """
    measured = [row for row in rows if row.state != "FAIL" and sortable(row.perplexity) < math.inf]
    hopeful = [row for row in measured if row.state != "PRUNED" or row.is_paused]
    return min(hopeful or measured, key=merit, default=None)


def merit(row: TrialRow) -> tuple[bool, float, float, int]:
    """Return what trials are sorted by, the best first."""
    metric = row.metric if row.state == "COMPLETE" else None
    chosen = metric.score if metric is not None and metric.chooses else None
    return chosen is None, -(chosen or 0.0), sortable(row.perplexity), row.number


def is_final(rows: Sequence[TrialRow], attributes: Mapping[str, str]) -> bool:
    """Return whether the study is finished, by the limits of its last start; else results are "so far"."""
    if any(row.state in UNFINISHED for row in rows):
        return False
    wanted = attributes.get("setting/sweep.study.n_trials", "")
    finished = sum(row.state in FINISHED for row in rows)
    return "exhausted" in attributes or (not wanted or wanted.isdigit() and finished >= int(wanted))


def progress_note(row: TrialRow) -> str:
    """Return how far a trial came that has not ended: "so far, rung 3"; "" for any other."""
    return f"so far, rung {len(row.perplexities)}" if row.state in UNFINISHED else ""


def base_of(attributes: Mapping[str, str]) -> float:
    """Return the base model's perplexity. Raises StudyError if the study does not have it."""
    try:
        return float(attributes["base_perplexity"])
    except (KeyError, ValueError):
        name = attributes.get("study", "")
        text = f"study.name: {name!r} has not measured its base model yet. Run the sweep first."
        raise StudyError(text) from None


def sortable(perplexity: float | None) -> float:
    """Return the perplexity, or infinity when it is missing or not finite."""
    return perplexity if perplexity is not None and math.isfinite(perplexity) else math.inf


def searched_keys(rows: Sequence[TrialRow]) -> list[str]:
    """Return every searched key, in the order in which the trials first show it."""
    return list(dict.fromkeys(key for row in rows for key in row.params))
