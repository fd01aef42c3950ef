"""What to try next: Optuna's samplers, every draw seeded by the sweep's seed and the trial's number.

A sweep that was interrupted draws what it would have drawn at that point; workers that share one differ.
"""

import heapq
import importlib.util
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from optuna import Study, create_study, samplers
from optuna.distributions import BaseDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from lora_search.config import SamplerConfig
from lora_search.errors import ConfigError
from lora_search.ledger import Cursor
from lora_search.seeds import draw_seed

# Optional dependencies of Optuna's.
NEEDS = {"cmaes": ("cmaes",), "gp": ("scipy", "torch"), "qmc": ("scipy",)}


MAX_TRIALS = 500  # that TPE looks at; its time grows with them, and one trial's share of what it knows falls
NUM_BEST = 25  # of them the best: more never count as good to TPE


class PerTrialSampler(samplers.BaseSampler):
    """Makes a new sampler for each trial. It keeps no state: what was tried before is read from the study."""

    def __init__(self, make: Callable[[int], samplers.BaseSampler]) -> None:
        self._make, self._current = make, make(0)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._current = self._make(trial.number)
        self._current.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._current.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        return self._current.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        return self._current.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._current.after_trial(study, trial, state, values)


class Outlook(samplers.BaseSampler):
    """Lets a sampler see what matters of the study: all trials up to MAX_TRIALS, then the best and an even
    share of the others, so that a draw costs the same at any size. A paused trial is seen as pruned, and the
    space is the sweep's own: a range that was widened stays part of it."""

    def __init__(self, sampler: samplers.BaseSampler, space: Mapping[str, BaseDistribution]) -> None:
        self._sampler, self._view = sampler, create_study()
        self._space = {key: d for key, d in space.items() if not d.single()}
        self._cursor = Cursor()
        self._finished: list[FrozenTrial] = []

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        finished, unfinished = self._cursor.read(study.get_trials(deepcopy=False))
        self._finished += [t for t in finished if t.state != TrialState.FAIL]
        shown = thinned(self._finished) + [t for t in unfinished if t.number != trial.number]
        self._view = create_study(storage=_Shown(shown))
        self._sampler.before_trial(self._view, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        return self._sampler.sample_relative(self._view, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        return self._sampler.sample_independent(self._view, trial, param_name, param_distribution)


class _Shown(InMemoryStorage):
    """Holds the trials that a sampler is shown."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._shown = sorted(trials, key=lambda t: t.number)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [t for t in self._shown if states is None or t.state in states]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """TPE shares what it drew, for others to avoid; the drawn trial itself tells them a moment later."""


def thinned(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return at most MAX_TRIALS of the trials: the best, and every so many-th other, by number."""
    if len(trials) <= MAX_TRIALS:
        return list(trials)
    best = heapq.nsmallest(NUM_BEST, trials, key=_rank)
    stride = 2 ** math.ceil(math.log2(len(trials) / (MAX_TRIALS - NUM_BEST)))
    chosen = {t.number for t in best}
    return best + [t for t in trials if t.number % stride == 0 and t.number not in chosen]


def _rank(trial: FrozenTrial) -> tuple[bool, int, float, int]:
    """Order trials as TPE does: COMPLETE by value, then PRUNED by how far they came and their value there."""
    if trial.state == TrialState.COMPLETE:
        return False, 0, trial.value or 0.0, trial.number
    step = trial.last_step
    value = math.inf if step is None else trial.intermediate_values[step]
    return True, -(step or 0), value, trial.number


def make_sampler(
    config: SamplerConfig, distributions: Mapping[str, BaseDistribution], seed: int
) -> samplers.BaseSampler:
    """Return the sampler of a sweep. Raises ConfigError where it cannot search this space.

    grid is no sampler here: the study itself hands out the untried points of the space, in seeded order.
    cmaes moves numbers only and draws choices at random.
    """
    missing = [name for name in NEEDS.get(config.name, ()) if importlib.util.find_spec(name) is None]
    if missing:
        remedy = f"Run: pip install {' '.join(missing)}"
        raise ConfigError("sampler.name", config.name, f"needs {' and '.join(missing)}", remedy)
    if config.name == "cmaes" and not any(hasattr(d, "high") for d in distributions.values()):
        remedy = "Use sampler=tpe, or search numbers by interval(...)"
        raise ConfigError("sampler.name", "cmaes", "cannot search a space of choices only", remedy)
    sampler = PerTrialSampler(lambda number: _make(config, seed, draw_seed(seed, number)))
    return Outlook(sampler, distributions) if config.name == "tpe" else sampler


def _make(config: SamplerConfig, sweep_seed: int, trial_seed: int) -> samplers.BaseSampler:
    startup = config.n_startup_trials
    match config.name:
        case "tpe":
            return samplers.TPESampler(
                seed=trial_seed, n_startup_trials=startup, multivariate=True, constant_liar=True
            )
        case "gp":
            return samplers.GPSampler(seed=trial_seed, n_startup_trials=startup)
        case "qmc":  # one sequence for the whole sweep; Optuna keeps its position in the study
            return samplers.QMCSampler(seed=sweep_seed, scramble=True, warn_independent_sampling=False)
        case "cmaes":
            return samplers.CmaEsSampler(
                seed=trial_seed, n_startup_trials=max(1, startup), warn_independent_sampling=False
            )
    return samplers.RandomSampler(seed=trial_seed)
