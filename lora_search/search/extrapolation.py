"""Extrapolates pruned trials to the end, for samplers that learn only from COMPLETE trials.

From its last rung on, a pruned trial's log perplexity is assumed to fall by the median fall of the COMPLETE
trials from that rung. So trials stopped at the same rung keep their order.
"""

import copy
import math
from collections.abc import Sequence
from statistics import median

from optuna.trial import FrozenTrial, TrialState

from lora_search.search.trials import best_until


def as_complete(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials with log perplexities as values; pruned trials with a measurement become COMPLETE."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE and _is_positive(t.value)]
    shown = []
    for trial in trials:
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            loss = _expected_loss(trial, complete)
            if loss is not None:
                shown.append(_with_value(trial, loss))
        else:
            shown.append(trial)
    return shown


def _expected_loss(trial: FrozenTrial, complete: Sequence[FrozenTrial]) -> float | None:
    if trial.state == TrialState.COMPLETE:
        return math.log(trial.value) if trial.value and _is_positive(trial.value) else None
    rung = trial.last_step or 0
    now = best_until(trial, rung)
    if not _is_positive(now):
        return None
    there = [(t.value, best_until(t, rung)) for t in complete]
    falls = [math.log(end) - math.log(then) for end, then in there if end and _is_positive(then)]
    return math.log(now) + (median(falls) if falls else 0.0)


def _is_positive(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


def _with_value(trial: FrozenTrial, value: float) -> FrozenTrial:
    shown = copy.copy(trial)
    shown.state, shown.value = TrialState.COMPLETE, value
    return shown
