"""Reads Optuna's trial records: rows for reports, progress, attributes."""

import copy
import json
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lora_search.trial import Measurement, TrialRow

# Reasons of trials that ended before they began; counts and reports leave them out.
DUPLICATE, SURPLUS = "duplicate of", "surplus:"
SETTINGS = "lora_search:settings"  # system attribute: what a trial began with, as JSON
PROGRESS = "lora_search:progress"  # system attribute: how much a trial has trained so far
NO_PROGRESS = {
    "best_rung": None, "examples_seen": 0, "train_tokens": 0, "train_seconds": 0.0,
    "untrained_rung": 0,  # the last rung at which it measured the bare base
}  # fmt: skip


def trial_rows(trials: Sequence[FrozenTrial]) -> list[TrialRow]:
    """Return every trial that began or will begin, by number."""
    return [trial_row(t) for t in trials if not never_began(t)]


def trial_row(trial: FrozenTrial) -> TrialRow:
    """Return one trial for reports."""
    best = best_until(trial, 2**31)
    progress = progress_of(trial)
    return TrialRow(
        number=trial.number,
        state=trial.state.name,
        perplexity=best if math.isfinite(best) else None,
        best_rung=progress["best_rung"],
        params=dict(trial.params),
        perplexities=dict(sorted(trial.intermediate_values.items())),
        reason=text_of(trial, "reason"),
        examples_seen=progress["examples_seen"],
        train_tokens=progress["train_tokens"],
        train_seconds=progress["train_seconds"],
        recovery=text_of(trial, "recovery"),
        began=trial.datetime_start.timestamp() if trial.datetime_start else None,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
        worker=text_of(trial, "worker"),
        is_paused=bool(trial.user_attrs.get(PAUSED)) and trial.datetime_complete is None,
    )


def progress_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return how much the trial has trained so far. Other programs' values of another type are ignored. Older
    versions kept it among the user attributes, as the settings."""
    stored, progress = trial.system_attrs.get(PROGRESS, trial.user_attrs.get("progress")), dict(NO_PROGRESS)
    if isinstance(stored, dict):
        progress |= {key: stored[key] for key in progress if isinstance(stored.get(key), int | float)}
    return progress


def text_of(trial: FrozenTrial, key: str) -> str:
    """Return a user attribute that is a text; "" if it is missing or of another type."""
    value = trial.user_attrs.get(key)
    return value if isinstance(value, str) else ""


def settings_of(trial: FrozenTrial) -> str:
    """Return the settings that the trial began with, as JSON; "" before it begins. Older versions kept them
    among the user attributes, where optuna-dashboard shows them in one line that does not wrap."""
    kept = trial.system_attrs.get(SETTINGS)
    return kept if isinstance(kept, str) else text_of(trial, "settings")


def count_of(trial: FrozenTrial, key: str) -> int:
    """Return a user attribute that is a count; 0 if it is missing or of another type."""
    value = trial.user_attrs.get(key)
    return value if isinstance(value, int) else 0


def progress_after(trial: FrozenTrial, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return how much the trial has trained after these measurements, its next ones."""
    last, seconds = measurements[-1], sum(m.train_seconds for m in measurements)
    before = progress_of(trial)["untrained_rung"]
    return {
        "best_rung": last.best_rung,
        "examples_seen": last.examples_seen,
        "train_tokens": last.train_tokens,
        "train_seconds": round(progress_of(trial)["train_seconds"] + seconds, 3),
        "untrained_rung": max((m.rung for m in measurements if _is_untrained(trial, m)), default=before),
    }


def _is_untrained(trial: FrozenTrial, measurement: Measurement) -> bool:
    """Return whether all its steps so far had a learning rate of 0: the first of a warm-up has."""
    try:
        settings = json.loads(settings_of(trial) or "{}")
        first_step = settings["batch_size"] * settings["gradient_accumulation_steps"]
        warmup = settings.get("warmup_steps", settings["warmup_ratio"])  # recorded only where it is set
        return bool(warmup > 0 and measurement.examples_seen <= first_step)
    except (ValueError, KeyError, TypeError):
        return False


def params_of(trial: FrozenTrial) -> Mapping[str, object]:
    """Return the parameters, also of a trial that is enqueued and has not begun."""
    fixed = trial.system_attrs.get("fixed_params")
    return fixed if isinstance(fixed, dict) else trial.params


def identity_of(trial: FrozenTrial) -> frozenset[object]:
    """Return a value that is equal for trials with the same parameters; 8 is 8.0."""
    return point_of(params_of(trial))


def point_of(params: Mapping[str, object]) -> frozenset[object]:
    """Return the parameters as a hashable value, also if another program has stored unhashable ones."""
    return frozenset((key, v if isinstance(v, Hashable) else str(v)) for key, v in params.items())


def never_began(trial: FrozenTrial) -> bool:
    """Return whether the trial was refused when it was drawn."""
    return text_of(trial, "reason").startswith((DUPLICATE, SURPLUS))


PAUSED = "paused"  # user attribute of a stopped trial that is RUNNING in Optuna and may be resumed


# A trial that is put back has no worker: with a dead worker's name, its next worker would look dead as well.
UNSIGNED = {"worker": ""}


def is_held_by(trial: FrozenTrial, worker: str) -> bool:
    """Return whether the trial is RUNNING and signed by this worker, or was paused by it."""
    return trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == worker


def settled(trial: FrozenTrial) -> FrozenTrial:
    """Return a paused trial as PRUNED, which it counts as; any other unchanged."""
    if trial.state != TrialState.RUNNING or not trial.user_attrs.get(PAUSED):
        return trial
    pruned = copy.copy(trial)
    pruned.state = TrialState.PRUNED
    return pruned


def is_bare(trial: FrozenTrial) -> bool:
    """Return whether the trial has only measured the bare base: warm-up starts with a learning rate of 0."""
    return bool((trial.last_step or 0) <= progress_of(trial)["untrained_rung"])


def best_until(trial: FrozenTrial, rung: int) -> float:
    """Return the trial's lowest finite perplexity up to the rung; infinity if it has none."""
    values = [v for step, v in trial.intermediate_values.items() if step <= rung and math.isfinite(v)]
    return min(values, default=math.inf)


FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def has_run_for(trial: FrozenTrial, seconds: int) -> bool:
    """Return whether the trial was drawn longer ago; if it is still unsigned, its worker has died."""
    age = time.time() - trial.datetime_start.timestamp() if trial.datetime_start else math.inf
    return age > seconds


UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


class Cursor:
    """Reads the trials that finished since the last read, and the open ones. Most reads query only these."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._num_seen = 0
        self._open: list[int] = []
        self.trials: list[FrozenTrial] = []  # all by number, as of the last read of everything

    def read(self, *, everything: bool) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """Return the trials that finished since the last call, and the open ones. Without ``everything`` it
        may miss trials that other workers began and ended since the last call."""
        if not everything:
            unfinished = self._study.get_trials(deepcopy=False, states=UNFINISHED)
            numbers = [t.number for t in unfinished]
            num_new = len(numbers) - len(self._open)
            if numbers == [*self._open, *range(self._num_seen, self._num_seen + num_new)]:
                self._open, self._num_seen = numbers, self._num_seen + num_new
                return [], unfinished
        self.trials = self._study.get_trials(deepcopy=False)
        candidates = [*self._open, *range(self._num_seen, len(self.trials))]
        finished = [n for n in candidates if self.trials[n].state.is_finished()]
        self._open = [n for n in candidates if not self.trials[n].state.is_finished()]
        self._num_seen = len(self.trials)
        return [self.trials[n] for n in finished], [self.trials[n] for n in self._open]
