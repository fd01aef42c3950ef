"""Which trials to stop early. The default rule is our own; the others are Optuna's, counted in our rungs.

Asynchronous successive halving (arXiv 1810.05934) on the data axis: rungs at first_rung x reduction_factor^i.
A trial is judged at the highest rung it has reached, by its best perplexity so far, against every trial that
has reached that rung, running ones included. It is judged again when others arrive, so the first trial at a
rung has no advantage. The leader, the best at the farthest rung, is never stopped, so a study always has a
COMPLETE trial.

All rules ignore a rung that a trial reached with a learning rate of 0 only, as at the start of a warm-up: it
measures the bare base.
"""

import importlib.util
import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

from optuna import pruners
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lora_search.search.trials import best_until, progress_of
from lora_search.settings.schema import PrunerConfig, require
from lora_search.trial import draw_seed

WILCOXON_P = 0.15  # one-sided: k rungs, all worse, give p = 2^-k, so three rungs are enough
NOBODY = (1, -math.inf)  # ranks behind every trial
WILCOXON_RUNGS = 4  # with fewer it could only decide at the end


class RungPruner(pruners.BasePruner):
    """Keeps the best ``ceil(n / reduction_factor)`` of n trials at a rung, and any that equal the last."""

    def __init__(self, first_rung: int, reduction_factor: int) -> None:
        self.first_rung, self.reduction_factor = first_rung, reduction_factor

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return bool(self.losers(study.get_trials(deepcopy=False), [trial]))

    def losers(self, trials: Sequence[FrozenTrial], judged: Sequence[FrozenTrial]) -> dict[int, str]:
        """Return number -> reason for the judged trials to stop. The order of the trials does not matter."""
        standings = Standings(self)
        for trial in trials:
            standings.put(trial)
        return standings.losers(judged)

    def rungs(self, trial: FrozenTrial) -> list[int]:
        """Return the rungs of this rule that the trial has reached since it was first trained, in order."""
        reached, rung, bare = [], self.first_rung, progress_of(trial)["untrained_rung"]
        while rung <= (trial.last_step or 0):
            reached.append(rung)
            rung *= self.reduction_factor
        return [rung for rung in reached if rung > bare]


Place = tuple[int, float]  # (-rung, perplexity): the farthest trials first, then the best


class Standings:
    """The values of all trials at each rung of the rule. To judge a trial costs the same in a study of any
    size."""

    def __init__(self, rule: RungPruner) -> None:
        self.rule = rule
        self._values: defaultdict[int, list[float]] = defaultdict(list)  # rung -> sorted best perplexities
        self._lead = NOBODY  # the best place of a COMPLETE trial
        self._places: list[Place] = []  # of unfinished trials, sorted, without paused ones
        self._unfinished: dict[int, tuple[dict[int, float], Place | None]] = {}  # what to take out again

    def put(self, trial: FrozenTrial) -> None:
        """Add a trial, in the place of what it was when it was unfinished. Paused ones are PRUNED."""
        self._take_out(trial.number)
        if trial.state == TrialState.FAIL:
            return
        values = {rung: best_until(trial, rung) for rung in self.rule.rungs(trial)}
        for rung, value in values.items():
            insort(self._values[rung], value)
        place = None if trial.state == TrialState.PRUNED else self._place(trial)
        if trial.state == TrialState.COMPLETE:
            self._lead = min(self._lead, self._place(trial))
            return
        self._unfinished[trial.number] = values, place
        if place is not None:
            insort(self._places, place)

    def _take_out(self, number: int) -> None:
        values, place = self._unfinished.pop(number, ({}, None))
        for rung, value in values.items():
            del self._values[rung][bisect_left(self._values[rung], value)]
        if place is not None:
            del self._places[bisect_left(self._places, place)]

    def losers(self, judged: Sequence[FrozenTrial]) -> dict[int, str]:
        """Return number -> reason for the judged trials to stop; they have been put in."""
        lead, reasons = min([self._lead, *self._places[:1]]), {}
        for trial in judged:
            rungs = self.rule.rungs(trial)
            if not rungs or self._place(trial) <= lead:
                continue
            values = self._values[rungs[-1]]
            if len(values) < self.rule.reduction_factor:
                continue  # too few to compare with; it is judged again when more arrive
            kept = math.ceil(len(values) / self.rule.reduction_factor)
            own, limit = best_until(trial, rungs[-1]), values[kept - 1]
            if own > limit:
                reasons[trial.number] = (
                    f"rung {rungs[-1]}: perplexity {own:.4f} is not among the best {kept} of {len(values)}"
                    f" (<= {limit:.4f})"
                )
        return reasons

    def promotable(self, paused: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the paused trials that would not be stopped now, the farthest and best first."""
        stay = self.losers(paused)
        return self.ranked([t for t in paused if t.number not in stay])

    def ranked(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the trials, the farthest and best first."""
        return sorted(trials, key=lambda t: (*self._place(t), t.number))

    def _place(self, trial: FrozenTrial) -> Place:
        rung = max(self.rule.rungs(trial), default=0)
        best = best_until(trial, rung)
        return (-rung, best) if math.isfinite(best) else NOBODY


class ThawPruner(pruners.BasePruner):
    """Stops nothing when Optuna asks: the study pauses trials as `thawing` decides."""

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return False


def stopped_by_optuna(study: Study, judged: Sequence[FrozenTrial], seed: int) -> list[FrozenTrial]:
    """Return the trials that one of Optuna's rules stops, once all reports of the pass are written.

    Some rules favour the trial that is judged first, so the order is drawn for each rung from the seed.
    """
    order = sorted(judged, key=lambda t: draw_seed(seed, t.last_step or 0, t.number))
    return [trial for trial in order if study.pruner.prune(study, trial)]


def make_pruner(config: PrunerConfig, num_rungs: int) -> pruners.BasePruner:
    """Return the pruner for trials of up to ``num_rungs`` rungs; ConfigError if it could never prune.

    median, percentile and wilcoxon compare with COMPLETE trials, so the first pack always trains to the end.
    wilcoxon pairs a trial's rungs with the best trial's; these are not independent, so p is a rule of thumb.
    """
    first, startup = config.first_rung, config.n_startup_trials
    rule = f"must be at most {num_rungs}, the rungs of the longest trial"
    require(first <= num_rungs, "pruner.first_rung", first, rule, "Lower it, or raise train.evals_per_epoch")
    match config.name:
        case "asha":
            return RungPruner(first, config.factor)
        case "freeze_thaw":
            return ThawPruner()
        case "hyperband":
            return pruners.HyperbandPruner(first, num_rungs, config.factor)
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
    rule = f"needs {WILCOXON_RUNGS} rungs to stop a trial before its end, and there are {num_rungs}"
    remedy = "Raise train.evals_per_epoch or train.epochs, or use pruner=asha"
    require(num_rungs >= WILCOXON_RUNGS, "pruner.name", "wilcoxon", rule, remedy)
    has_scipy = importlib.util.find_spec("scipy") is not None
    require(has_scipy, "pruner.name", "wilcoxon", "needs the package scipy", "Run: pip install scipy")
    return pruners.WilcoxonPruner(p_threshold=WILCOXON_P, n_startup_steps=first_rung)
