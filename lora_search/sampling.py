"""Which settings to try next: Optuna's samplers, seeded so that a continued sweep goes on instead of repeating itself."""

import importlib.util
import math
from collections.abc import Sequence

import numpy as np
import optuna
from optuna import samplers
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.distributions import CategoricalChoiceType
from optuna.trial import FrozenTrial, TrialState

from lora_search.config import SamplerConfig
from lora_search.errors import ConfigError


class AskTellGridSampler(samplers.GridSampler):
    """Optuna's grid, without its call of study.stop, which an ask-and-tell loop refuses."""

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Do nothing: the study notices itself when the grid is exhausted, by its duplicates."""


def make_sampler(
    config: SamplerConfig, distributions: dict[str, BaseDistribution], seed: int, num_trials: int
) -> samplers.BaseSampler:
    """Return the sampler; ``num_trials`` already in the study move its random stream on."""
    stream = int(np.random.SeedSequence((seed, num_trials)).generate_state(1)[0])
    match config.name:
        case "tpe":
            return samplers.TPESampler(
                seed=stream, n_startup_trials=config.n_startup_trials, multivariate=True, constant_liar=True
            )
        case "gp":
            return samplers.GPSampler(seed=stream, n_startup_trials=config.n_startup_trials)
        case "grid":
            return AskTellGridSampler({key: _grid(key, d) for key, d in distributions.items()}, seed=stream)
        case "qmc":
            return samplers.QMCSampler(
                seed=seed, warn_independent_sampling=False, warn_asynchronous_seeding=False
            )
        case "cmaes":
            if importlib.util.find_spec("cmaes") is None:
                raise ConfigError(
                    "sampler.name", "cmaes", "needs the package cmaes", "Run: pip install cmaes"
                )
            return samplers.CmaEsSampler(
                seed=stream, n_startup_trials=config.n_startup_trials, warn_independent_sampling=False
            )
    return samplers.RandomSampler(seed=stream)


def _grid(key: str, distribution: BaseDistribution) -> Sequence[CategoricalChoiceType]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = math.floor((distribution.high - distribution.low) / distribution.step + 1e-9) + 1
        return [distribution.low + i * distribution.step for i in range(count)]
    raise ConfigError(
        f"space.{key}", "interval", "a grid needs countable values", "Use choice(...) or range(...)."
    )
