"""What the study remembers, read from Optuna's records: rows, counts, attributes and the fingerprint."""

import math
from collections.abc import Mapping, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from lora_search.errors import FingerprintError
from lora_search.pruning import best_until
from lora_search.trial import StudySummary, TrialRow

# Reasons of trials that ended before they began; no count and no report shows them.
DUPLICATE, SURPLUS = "duplicate of", "surplus:"


def summarize(trials: Sequence[FrozenTrial], n_trials: int) -> StudySummary:
    """Return the counts and the best COMPLETE trial."""
    begun = [t for t in trials if not never_began(t)]
    states = [t.state for t in begun]
    complete, pruned = states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)
    values = {t.number: t.value for t in begun if t.state == TrialState.COMPLETE and t.value is not None}
    best = min(values, key=lambda number: values[number], default=None)
    return StudySummary(
        finished=complete + pruned,
        n_trials=n_trials,
        complete=complete,
        pruned=pruned,
        failed=states.count(TrialState.FAIL),
        running=states.count(TrialState.RUNNING),
        best_number=best,
        best_perplexity=None if best is None else values[best],
    )


def trial_rows(trials: Sequence[FrozenTrial]) -> list[TrialRow]:
    """Return every trial that began or will begin, by number."""
    return [trial_row(t) for t in trials if not never_began(t)]


def attributes_of(study: optuna.Study) -> dict[str, str]:
    return {key: str(value) for key, value in study.user_attrs.items()}


def check_fingerprint(study: optuna.Study, fingerprint: Mapping[str, str]) -> None:
    """Store the fingerprint of a new study; raise FingerprintError where an old one has another."""
    stored = study.user_attrs.get("fingerprint")
    if stored is None:
        study.set_user_attr("fingerprint", dict(fingerprint))
        return
    keys = sorted({*stored, *fingerprint})
    changed = [
        f"{k}: {stored.get(k)} -> {fingerprint.get(k)}" for k in keys if stored.get(k) != fingerprint.get(k)
    ]
    if changed:
        listed = "\n  ".join(changed)
        raise FingerprintError(
            f"study.name: {study.study_name!r} was started with other settings:\n  {listed}\n"
            "Choose a new study.name, or put these back. Free to change: study.n_trials, engine.slots, "
            "engine.tokens_per_pass, engine.device, tracker, study.heartbeat_seconds."
        )


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
    attrs = trial.user_attrs
    return TrialRow(
        number=trial.number,
        state=trial.state.name,
        perplexity=best if math.isfinite(best) else None,
        best_rung=attrs.get("best_rung"),
        params=dict(trial.params),
        perplexities=dict(sorted(trial.intermediate_values.items())),
        reason=attrs.get("reason", ""),
        examples_seen=attrs.get("examples_seen", 0),
        train_tokens=attrs.get("train_tokens", 0),
        train_seconds=attrs.get("train_seconds", 0.0),
        recovery=attrs.get("recovery", ""),
    )


def params_of(trial: FrozenTrial) -> Mapping[str, object]:
    """Return the parameters, also of a trial that is enqueued and has not begun."""
    params: Mapping[str, object] = trial.system_attrs.get("fixed_params", trial.params)
    return params


def never_began(trial: FrozenTrial) -> bool:
    """Return whether the trial was refused when it was drawn."""
    return str(trial.user_attrs.get("reason", "")).startswith((DUPLICATE, SURPLUS))
