"""What the study remembers, read from Optuna's records: rows, counts, attributes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from lora_search.search.pruning import best_until
from lora_search.trial import Measurement, TrialRow

# Reasons of trials that ended before they began; no count and no report shows them.
DUPLICATE, SURPLUS = "duplicate of", "surplus:"
PROGRESS = "progress"  # user attribute: what a trial has trained so far


def trial_rows(trials: Sequence[FrozenTrial]) -> list[TrialRow]:
    """Return every trial that began or will begin, by number."""
    return [trial_row(t) for t in trials if not never_began(t)]


def attributes_of(study: optuna.Study) -> dict[str, str]:
    return {key: str(value) for key, value in study.user_attrs.items()}


def describe(study: optuna.Study, attributes: Mapping[str, str]) -> None:
    """Store what is new among the attributes."""
    if study.metric_names is None:
        study.set_metric_names(["validation perplexity"])
    stored = study.user_attrs
    for key, value in attributes.items():
        if stored.get(key) != value:
            study.set_user_attr(key, value)


def trial_row(trial: FrozenTrial) -> TrialRow:
    """Return one trial as reports know it."""
    best = best_until(trial, 2**31)
    progress = progress_of(trial)
    return TrialRow(
        number=trial.number,
        state=trial.state.name,
        perplexity=best if math.isfinite(best) else None,
        best_rung=progress["best_rung"],
        params=dict(trial.params),
        perplexities=dict(sorted(trial.intermediate_values.items())),
        reason=trial.user_attrs.get("reason", ""),
        examples_seen=progress["examples_seen"],
        train_tokens=progress["train_tokens"],
        train_seconds=progress["train_seconds"],
        recovery=trial.user_attrs.get("recovery", ""),
    )


def progress_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return what the trial has trained so far."""
    stored: dict[str, Any] = trial.user_attrs.get(PROGRESS, {})
    return {"best_rung": None, "examples_seen": 0, "train_tokens": 0, "train_seconds": 0.0} | stored


def progress_after(trial: FrozenTrial, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return what the trial has trained once these measurements, its next, are counted."""
    last, seconds = measurements[-1], sum(m.train_seconds for m in measurements)
    return {
        "best_rung": last.best_rung,
        "examples_seen": last.examples_seen,
        "train_tokens": last.train_tokens,
        "train_seconds": round(progress_of(trial)["train_seconds"] + seconds, 3),
    }


def params_of(trial: FrozenTrial) -> Mapping[str, object]:
    """Return the parameters, also of a trial that is enqueued and has not begun."""
    params: Mapping[str, object] = trial.system_attrs.get("fixed_params", trial.params)
    return params


def never_began(trial: FrozenTrial) -> bool:
    """Return whether the trial was refused when it was drawn."""
    return str(trial.user_attrs.get("reason", "")).startswith((DUPLICATE, SURPLUS))
