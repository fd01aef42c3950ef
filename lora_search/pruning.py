"""Who is stopped early. The default rule is our own; the others are Optuna's, in units of our rungs.

Asynchronous successive halving (arXiv 1810.05934) on the data axis: rungs at first_rung x reduction_factor^i. A trial
is judged at the highest of them it has reached, by its best perplexity so far, against every trial that has been
there, running ones included. It is judged again whenever others arrive, so the first at a rung is not favoured; the
best at the farthest rung always survives, so a study always has a COMPLETE trial.
"""

import math

from optuna import pruners
from optuna.study import Study
from optuna.trial import FrozenTrial

from lora_search.config import PrunerConfig


class RungPruner(pruners.BasePruner):
    """Keeps the best ``ceil(n / reduction_factor)`` of the n trials that reached a rung; equal values stand together."""

    def __init__(self, first_rung: int, reduction_factor: int) -> None:
        self.first_rung, self.reduction_factor = first_rung, reduction_factor

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return self.verdict(study, trial) is not None

    def verdict(self, study: Study, trial: FrozenTrial) -> str | None:
        """Return why the trial is stopped, or None."""
        rung = self._judged_rung(trial.last_step)
        if rung is None:
            return None
        peers = study.get_trials(deepcopy=False)
        values = sorted(best_until(t, rung) for t in peers if t.last_step is not None and t.last_step >= rung)
        if len(values) < self.reduction_factor:
            return None  # too few to compare with; it is judged again when more have come
        kept = math.ceil(len(values) / self.reduction_factor)
        own, bar = best_until(trial, rung), values[kept - 1]
        if own <= bar:
            return None
        return f"rung {rung}: {own:.3f} is not in the best {kept} of {len(values)} (<= {bar:.3f})"

    def _judged_rung(self, last_step: int | None) -> int | None:
        rung, judged = self.first_rung, None
        while last_step is not None and rung <= last_step:
            judged, rung = rung, rung * self.reduction_factor
        return judged


def best_until(trial: FrozenTrial, rung: int) -> float:
    """Return the trial's lowest perplexity up to the rung; infinity where it has none that is finite."""
    values = [v for step, v in trial.intermediate_values.items() if step <= rung and math.isfinite(v)]
    return min(values, default=math.inf)


def make_pruner(config: PrunerConfig, num_rungs: int) -> pruners.BasePruner:
    """Return the pruner of a sweep whose longest trial has ``num_rungs`` rungs."""
    first, startup = config.first_rung, config.n_startup_trials
    match config.name:
        case "asha":
            return RungPruner(first, config.reduction_factor)
        case "hyperband":
            return pruners.HyperbandPruner(first, num_rungs, config.reduction_factor)
        case "median":
            return pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=first - 1)
        case "percentile":
            return pruners.PercentilePruner(
                config.percentile, n_startup_trials=startup, n_warmup_steps=first - 1
            )
        case "patient":
            return pruners.PatientPruner(None, patience=config.patience)
        case "wilcoxon":
            return pruners.WilcoxonPruner(n_startup_steps=max(2, first))
    return pruners.NopPruner()
