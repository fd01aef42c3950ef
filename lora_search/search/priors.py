"""The first points of a search: the settings outside `space`, then learning rates that worked best for other
models. Pure: no study, no I/O."""

import math
from collections.abc import Iterator

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import Space

LR = "optim.lr"
SPREAD = 3.0  # between the rates: three of them span nearly a decade
APART = 1.5  # rates nearer to each other than this tell little


def first_points(config: SweepConfig, space: Space, base_width: float | None) -> list[dict[str, object]]:
    """Return the points to try before the sampler draws, at most n_trials: the settings outside `space`
    (study.first_trial_is_default), then the same with other learning rates (study.first_trials).

    A rate outside the searched range is moved to its end. A setting outside its range is drawn instead.
    """
    default, given = space.default_params(config), space.given_params(config)
    points = [default] if default is not None and config.study.first_trial_is_default else []
    rates = space.of(given).get(LR)
    if config.study.first_trials and base_width and rates is not None:
        for wanted in prior_rates(base_width):
            rate = nearest(rates, wanted)
            if rate is not None and all(_is_apart(rate, point[LR]) for point in points):
                points.append({**given, LR: rate})
    return points[: config.study.most_trials]


def prior_rates(base_width: float) -> tuple[float, float, float]:
    """Return a learning rate for LoRA at alpha 32 on a Llama of this width, three times it, and a third.

    5e-4 * (2000 / width)^0.781 is tinker-cookbook's fit for Llama (`hyperparam_utils`), at batch 128.
    On its public grid of 35 models, the better of 3e-4 and 1e-3 is within 0.1 % NLL of the best for nine in
    ten. The batch is left out: the square-root rule would put SmolLM2 at batch 4 at 2.3e-4, where the short
    trials of tests/benchmarks/curves.json are best at 1.5e-3 to 3e-3; without it the formula gives 1.3e-3.
    """
    middle = 5e-4 * (2000 / base_width) ** 0.781
    return middle, SPREAD * middle, middle / SPREAD


def nearest(distribution: BaseDistribution, wanted: float) -> float | None:
    """Return the nearest rate of the distribution, by ratio; None if it has no rates."""
    if isinstance(distribution, CategoricalDistribution):
        rates = [c for c in distribution.choices if isinstance(c, float | int) and c > 0]
        return min(rates, key=lambda c: abs(math.log(c / wanted)), default=None)
    if not isinstance(distribution, FloatDistribution):
        return None
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is not None:
        return min(_steps(low, high, step), key=lambda c: abs(c - wanted))
    return min(high, max(low, float(f"{wanted:.2g}")))


def _steps(low: float, high: float, step: float) -> Iterator[float]:
    return (low + i * step for i in range(round((high - low) / step) + 1))


def _is_apart(rate: float, other: object) -> bool:
    assert isinstance(other, float | int)
    return abs(math.log(rate / other)) >= math.log(APART)
