"""Which trial is better, and how values are written: one answer for screen, report and export. Pure."""

import math
from collections.abc import Mapping, Sequence

from lora_search.errors import StudyError
from lora_search.trial import TrialRow


def ranked(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials that have begun, lowest perplexity first, those without one last. An interrupted one
    is WAITING and has begun."""
    started = [row for row in rows if row.state != "WAITING" or row.perplexities]
    return sorted(started, key=lambda row: (sortable(row.perplexity), row.number))


def best_of(rows: Sequence[TrialRow]) -> TrialRow | None:
    """Return the COMPLETE trial of lowest perplexity, the study's best; None when no trial is complete."""
    complete = [row for row in rows if row.state == "COMPLETE" and sortable(row.perplexity) < math.inf]
    return min(complete, key=lambda row: (sortable(row.perplexity), row.number), default=None)


def base_of(attributes: Mapping[str, str]) -> float:
    """Return the base model's perplexity. Raises StudyError where the study does not have it."""
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
