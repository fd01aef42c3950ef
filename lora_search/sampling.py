"""What to try next: Optuna's samplers, every draw seeded by the sweep's seed and the trial's number.

A sweep that was interrupted draws what it would have drawn at that point; workers that share one differ.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from optuna import Study, samplers
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from lora_search.config import SamplerConfig
from lora_search.errors import ConfigError

# Optional dependencies of Optuna's.
NEEDS = {"cmaes": ("cmaes",), "gp": ("scipy", "torch"), "qmc": ("scipy",)}


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
    return PerTrialSampler(lambda number: _make(config, seed, draw_seed(seed, number)))


def draw_seed(*parts: int) -> int:
    """Return a seed made of others, e.g. the sweep's and a trial's number: the same wherever it is asked."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


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
