"""Settings as points of the unit cube, and random settings. Pure: no torch, no I/O."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lora_search.settings.grammar import identity, stepped
from lora_search.settings.space import Space

ABSENT = 0.5  # the place of a number that a trial does not have; of choices it has none


class Range(NamedTuple):
    """The numbers of one key, over all branches on which it depends."""

    low: float
    high: float
    log: bool


class Choices(NamedTuple):
    """The choices of one key. ``ordered``: all are numbers, which have places by their rank."""

    values: tuple[object, ...]
    ordered: bool


class Axes:
    """The searched keys of a space with more than one value, each one axis: choices without an order have one
    each."""

    def __init__(self, space: Space) -> None:
        branches = {key: list(when.branches.values()) for key, when in space.conditions.items()}
        every = {**{key: [d] for key, d in space.distributions.items()}, **branches}
        axes = {key: _axis(distributions) for key, distributions in every.items()}
        self._axes = {key: axis for key, axis in axes.items() if axis is not None}

    def point(self, params: Mapping[str, object]) -> list[float]:
        """Return the place of settings: 0 to 1 on every axis, those beyond a range at its end."""
        places = (_places(axis, params.get(key)) for key, axis in self._axes.items())
        return [place for several in places for place in several]


def _axis(distributions: Sequence[BaseDistribution]) -> Range | Choices | None:
    """Return the axis of a key over its branches; None if it has one value only."""
    first = distributions[0]
    if isinstance(first, CategoricalDistribution):  # all branches have the same choices
        numbers = [c for c in first.choices if isinstance(c, int | float) and not isinstance(c, bool)]
        ordered = len(numbers) == len(first.choices)
        return (
            None if first.single() else Choices(tuple(sorted(numbers) if ordered else first.choices), ordered)
        )
    ranges = [d for d in distributions if isinstance(d, FloatDistribution | IntDistribution)]
    low, high = min(d.low for d in ranges), max(d.high for d in ranges)
    return Range(low, high, ranges[0].log) if low < high else None


def _places(axis: Range | Choices, value: object) -> list[float]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(axis, Choices) and not axis.ordered:
        return [float(value == choice and type(value) is type(choice)) for choice in axis.values]
    if not is_number:
        return [ABSENT]
    assert isinstance(value, int | float)
    if isinstance(axis, Choices):
        ranks = np.linspace(0, 1, len(axis.values))
        return [float(np.interp(value, np.array(axis.values, dtype=float), ranks))]
    low, high, own = (_scaled(number, axis.log) for number in (axis.low, axis.high, value))
    return [min(1.0, max(0.0, (own - low) / (high - low)))]


def _scaled(number: float, log: bool) -> float:
    if not log:
        return float(number)
    return math.log(number) if number > 0 else -math.inf


def draw(space: Space, rng: np.random.Generator) -> dict[str, object]:
    """Return random settings of the space, log ranges even in the logarithm."""
    params: dict[str, object] = {key: _value(d, rng) for key, d in space.distributions.items()}
    return params | {key: _value(d, rng) for key, d in space.of(params).items() if key not in params}


def _value(distribution: BaseDistribution, rng: np.random.Generator) -> object:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(rng.integers(len(distribution.choices)))]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log and isinstance(distribution, IntDistribution):
        number = round(math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5))))
        return int(min(high, max(low, number)))
    if step is not None and not distribution.log:
        count = math.floor((high - low) / step + 1e-9) + 1
        return stepped(low, step, int(rng.integers(count)))
    if distribution.log:
        return float(min(high, max(low, math.exp(rng.uniform(math.log(low), math.log(high))))))
    return float(rng.uniform(low, high))


def untried(
    space: Space, count: int, tried: Iterable[Mapping[str, object]], rng: np.random.Generator
) -> list[dict[str, object]]:
    """Return up to so many random settings that were not tried, each once; none only if all were tried."""
    seen = {identity(params) for params in tried}
    drawn = {identity(params): params for params in (draw(space, rng) for _ in range(count))}
    if fresh := [params for point, params in drawn.items() if point not in seen]:
        return fresh
    left = space.untried(tried) or []
    return [left[i] for i in rng.permutation(len(left))[:count].tolist()]
