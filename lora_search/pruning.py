"""Who is stopped early. The default rule is our own; the others are Optuna's, in units of our rungs.

Asynchronous successive halving (arXiv 1810.05934) on the data axis: rungs at first_rung x reduction_factor^i.
A trial is judged at the highest it has reached, by its best perplexity so far, against every trial that was
there, running ones included. It is judged again when others arrive: the first at a rung is not favoured. The
leader, the best at the farthest rung, is always spared, so a study always has a COMPLETE trial.
"""

import importlib.util
import math
from collections.abc import Sequence

from optuna import pruners
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lora_search.config import PrunerConfig, require

WILCOXON_P = 0.15  # one-sided: k rungs, all worse, give p = 2^-k, so three rungs can decide
WILCOXON_RUNGS = 4  # with fewer it would decide at the end only


class RungPruner(pruners.BasePruner):
    """Keeps the best ``ceil(n / reduction_factor)`` of n trials at a rung; equal values stand together."""

    def __init__(self, first_rung: int, reduction_factor: int) -> None:
        self.first_rung, self.reduction_factor = first_rung, reduction_factor

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return bool(self.losers(study.get_trials(deepcopy=False), [trial]))

    def losers(self, trials: Sequence[FrozenTrial], judged: Sequence[FrozenTrial]) -> dict[int, str]:
        """Return number -> why it is stopped, of the judged among all trials. Order changes nothing."""
        peers = [t for t in trials if t.state != TrialState.FAIL and t.last_step is not None]
        lead = self._lead(peers)
        sorted_values: dict[int, list[float]] = {}
        reasons = {}
        for trial in judged:
            rung = self._reached(trial)
            if rung == 0:
                continue
            if rung not in sorted_values:
                there = [t for t in peers if self._reached(t) >= rung]
                sorted_values[rung] = sorted(best_until(t, rung) for t in there)
            values, own = sorted_values[rung], best_until(trial, rung)
            if len(values) < self.reduction_factor:
                continue  # too few to compare with; it is judged again when more have come
            kept = math.ceil(len(values) / self.reduction_factor)
            if own > values[kept - 1] and (-rung, own) > lead:
                reasons[trial.number] = (
                    f"rung {rung}: perplexity {own:.4f} is not among the best {kept} of {len(values)}"
                    f" (<= {values[kept - 1]:.4f})"
                )
        return reasons

    def _lead(self, peers: Sequence[FrozenTrial]) -> tuple[int, float]:
        """Return (-rung, perplexity) of the farthest, then best trial that may still become the result."""
        rungs = [(self._reached(t), t) for t in peers if t.state != TrialState.PRUNED]
        places = [(-rung, best_until(t, rung)) for rung, t in rungs]
        return min((place for place in places if math.isfinite(place[1])), default=(0, -math.inf))

    def _reached(self, trial: FrozenTrial) -> int:
        """Return the highest rung of this rule that the trial has been at, 0 before the first."""
        reached, rung = 0, self.first_rung
        while rung <= (trial.last_step or 0):
            reached, rung = rung, rung * self.reduction_factor
        return reached


def best_until(trial: FrozenTrial, rung: int) -> float:
    """Return the trial's lowest perplexity up to the rung; infinity where it has none that is finite."""
    values = [v for step, v in trial.intermediate_values.items() if step <= rung and math.isfinite(v)]
    return min(values, default=math.inf)


def make_pruner(config: PrunerConfig, num_rungs: int) -> pruners.BasePruner:
    """Return the pruner for trials of up to ``num_rungs`` rungs; ConfigError where it cannot work.

    median, percentile and wilcoxon compare with COMPLETE trials: the first pack trains to its end. wilcoxon
    pairs a trial's rungs with the best trial's; they are not independent, so its p is a rule of thumb.
    """
    first, startup = config.first_rung, config.n_startup_trials
    rule = f"must be at most {num_rungs}, the rungs of the longest trial"
    require(first <= num_rungs, "pruner.first_rung", first, rule, "Lower it, or raise train.evals_per_epoch")
    match config.name:
        case "asha":
            return RungPruner(first, config.reduction_factor)
        case "hyperband":
            return pruners.HyperbandPruner(first, num_rungs, config.reduction_factor)
        case "median":
            return pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=first)
        case "percentile":
            return pruners.PercentilePruner(config.percentile, n_startup_trials=startup, n_warmup_steps=first)
        case "patient":
            return pruners.PatientPruner(None, patience=config.patience)
        case "wilcoxon":
            return _wilcoxon(first, num_rungs)
    return pruners.NopPruner()


def _wilcoxon(first_rung: int, num_rungs: int) -> pruners.BasePruner:
    rule = f"needs {WILCOXON_RUNGS} rungs to stop anything before its end, and there are {num_rungs}"
    remedy = "Raise train.evals_per_epoch or train.epochs, or use pruner=asha"
    require(num_rungs >= WILCOXON_RUNGS, "pruner.name", "wilcoxon", rule, remedy)
    has_scipy = importlib.util.find_spec("scipy") is not None
    require(has_scipy, "pruner.name", "wilcoxon", "needs the package scipy", "Run: pip install scipy")
    return pruners.WilcoxonPruner(p_threshold=WILCOXON_P, n_startup_steps=first_rung)
