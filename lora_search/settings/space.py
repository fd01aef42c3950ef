"""The searched hyperparameters: which keys a trial has, its points, its extremes.

`space` mirrors the keys that it searches; null disables one.
"""

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lora_search.errors import ConfigError
from lora_search.settings.grammar import When, WhenCall, as_choice, identity, read_key, resolve, stepped
from lora_search.settings.overlay import FIXED, encoded, searchable_keys, trial_settings, value_of
from lora_search.settings.schema import OptimConfig, SweepConfig
from lora_search.trial import TrialSettings

USED_BY = {"min_lr_ratio": ("cosine", "linear", "wsd"), "decay_ratio": ("wsd",)}  # key of optim -> schedules
MAX_POINTS = 10_000  # larger spaces are not enumerated


@dataclass(frozen=True)
class Space:
    """Dotted key -> distribution. A choice that is a list is encoded as JSON."""

    distributions: dict[str, BaseDistribution]  # of the keys that every trial has
    expressions: dict[str, str]
    conditions: dict[str, When] = field(default_factory=dict)  # of the keys that some trials have

    def of(self, params: Mapping[str, object]) -> dict[str, BaseDistribution]:
        """Return the distributions of all keys that a trial with these parameters has."""
        branches = {key: when.branches.get(params.get(when.parent)) for key, when in self.conditions.items()}
        return {**self.distributions, **{key: d for key, d in branches.items() if d is not None}}

    @property
    def parents(self) -> dict[str, str]:
        """Return the key that each conditional key depends on."""
        return {key: when.parent for key, when in self.conditions.items()}

    def default_params(self, config: SweepConfig) -> dict[str, object] | None:
        """Return the settings outside `space` as a point of the space, or None if one is out of range."""
        return None if self.outside(config) else self.given_params(config)

    def given_params(self, config: SweepConfig) -> dict[str, object]:
        """Return the settings outside `space` that are in the range of their key."""
        outside = self.outside(config)
        return {k: encoded(value_of(config, k)) for k in self._given(config) if k not in outside}

    def outside(self, config: SweepConfig) -> dict[str, object]:
        """Return the settings outside `space` that are not in the range of their key."""
        given = {key: (d, value_of(config, key)) for key, d in self._given(config).items()}
        return {key: value for key, (d, value) in given.items() if not _contains(d, encoded(value))}

    def _given(self, config: SweepConfig) -> dict[str, BaseDistribution]:
        """Return the distributions of the keys that the settings outside `space` ask for."""
        return self.of({key: encoded(value_of(config, key)) for key in self.distributions})

    def refusal(self, params: Mapping[str, object]) -> str:
        """Return why these parameters are not in the space; "" if they are."""
        distributions = self.of(params)
        for key, value in params.items():
            if key not in distributions:
                return f"{key} is not searched"
            if isinstance(value, list | dict) or not _contains(distributions[key], value):
                return f"{key}={value} is not in {self.expressions[key]}"
        return ""

    @cached_property
    def num_points(self) -> int | None:
        """The number of points; None if there are more than MAX_POINTS."""
        branches = (d for when in self.conditions.values() for d in when.branches.values())
        if any(_axis(d) is None for d in (*self.distributions.values(), *branches)):
            return None
        count = sum(1 for _ in itertools.islice(self.points(_axis), MAX_POINTS + 1))
        return count if count <= MAX_POINTS else None

    def untried(self, tried: Iterable[Mapping[str, object]]) -> list[dict[str, object]] | None:
        """Return the points not in ``tried``, in order; None if the space cannot be enumerated."""
        if self.num_points is None:
            return None
        seen = {identity(params) for params in tried}
        return [point for point in self.points(_axis) if identity(point) not in seen]

    def points(
        self, axis: Callable[[BaseDistribution], Sequence[object] | None]
    ) -> Iterator[dict[str, object]]:
        """Yield every combination of the values on each key's axis."""
        for free in _combinations(self.distributions, axis):
            mine = {key: d for key, d in self.of(free).items() if key not in free}
            yield from ({**free, **more} for more in _combinations(mine, axis))

    def limited(self, keys: Sequence[str]) -> "Space":
        """Return the space of these keys and those that they depend on."""
        conditions = {key: when for key, when in self.conditions.items() if key in keys}
        wanted = {*keys, *(when.parent for when in conditions.values())}
        return Space(
            {key: d for key, d in self.distributions.items() if key in wanted}, self.expressions, conditions
        )


def parse_space(config: SweepConfig) -> Space:
    """Return the space of a sweep. Raises ConfigError with the key under `space`."""
    expressions = dict(sorted(_flatten(config.space)))
    for key in expressions:
        _require_searchable(key)
    read = {key: read_key(config, key, text) for key, text in expressions.items()}
    always = {key: d for key, d in read.items() if not isinstance(d, WhenCall)}
    space = Space(always, expressions, {
        key: resolve(config, key, expressions[key], call, always)
        for key, call in read.items() if isinstance(call, WhenCall)
    })  # fmt: skip
    if not expressions and config.study.most_trials > 1:
        remedy = "Search something, e.g. space.lora.r=choice(8,16), or set study.n_trials=1."
        raise ConfigError("space", {}, "must search something when study.n_trials is above 1", remedy)
    if config.sampler.name == "grid":
        _require_grid(space)
    _require_effect(config, space)
    return space


def corners(config: SweepConfig, space: Space, keys: Sequence[str]) -> list[TrialSettings]:
    """Return the settings at every combination of the keys' choices and bounds, or fixed values."""
    return [trial_settings(config, point) for point in space.limited(keys).points(_bounds)]


def _bounds(distribution: BaseDistribution) -> Sequence[object]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return distribution.low, distribution.high


def largest(config: SweepConfig, space: Space, key: str) -> int:
    """Return the largest value of an integer key."""
    return max(int(end) for end in _ends(config, space, key) if isinstance(end, int | float))


def smallest(config: SweepConfig, space: Space, key: str) -> int:
    """Return the smallest value of an integer key."""
    return min(int(end) for end in _ends(config, space, key) if isinstance(end, int | float))


def _ends(config: SweepConfig, space: Space, key: str) -> list[object]:
    """Return the choices and bounds of a key, and its own value where a trial has no other."""
    own = encoded(value_of(config, key))
    return [point.get(key, own) for point in space.limited([key]).points(_bounds)]


def _combinations(
    distributions: Mapping[str, BaseDistribution],
    axis: Callable[[BaseDistribution], Sequence[object] | None],
) -> Iterator[dict[str, object]]:
    axes = [axis(d) or () for d in distributions.values()]
    return (dict(zip(distributions, values, strict=True)) for values in itertools.product(*axes))


def _flatten(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    leaves: list[tuple[str, str]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            leaves += _flatten(value, f"{key}.")
        elif isinstance(value, str):
            leaves.append((key, value))
        elif value is not None:
            _require_searchable(key)
            raise ConfigError(f"space.{key}", value, "must be a sweep", as_choice(key, value))
    return leaves


def _require_searchable(key: str) -> None:
    searchable = searchable_keys()
    if key in searchable:
        return
    if key in FIXED:
        raise ConfigError(
            f"space.{key}", key, "cannot be searched", "All trials must meet at the same rungs."
        )
    name = key.rpartition(".")[2]
    near = [k for k in searchable if k.endswith(f".{name}")] or difflib.get_close_matches(
        key, searchable, n=3
    )
    shown = " or ".join(f"space.{k}" for k in near)
    remedy = f"Did you mean {shown}?" if near else "Keys of lora, optim and train can be searched."
    raise ConfigError(f"space.{key}", key, "is not a setting that can be searched", remedy)


def _require_effect(config: SweepConfig, space: Space) -> None:
    """Raise ConfigError for a key that is set or searched and would change no trial."""
    for name, users in USED_BY.items():
        when = space.conditions.get(f"optim.{name}")
        is_bound = when is not None and when.parent == "optim.schedule"
        schedules = [*when.branches] if when and is_bound else _ends(config, space, "optim.schedule")
        value, is_searched = getattr(config.optim, name), f"optim.{name}" in space.expressions
        is_given = is_searched or value != getattr(OptimConfig(), name)
        idle = [schedule for schedule in schedules if schedule not in users]
        if is_given and idle and (is_bound or idle == schedules):  # each branch of a `when` must count
            shown = space.expressions[f"optim.{name}"] if is_searched else value
            rule = f"has no effect with optim.schedule={', '.join(map(str, idle))}"
            remedy = f"Leave it out, or set optim.schedule={' or '.join(users)}."
            if idle != schedules:
                remedy = f"Leave {', '.join(map(str, idle))} out of when(...)."
            raise ConfigError(f"optim.{name}", shown, rule, remedy)
    ratio, steps = "optim.warmup_ratio", _ends(config, space, "optim.warmup_steps")
    if ratio in space.expressions and None not in steps:
        rule, remedy = (
            "has no effect while optim.warmup_steps is set",
            "Set space.optim.warmup_ratio=null, or",
        )
        remedy += " optim.warmup_steps=null."
        raise ConfigError(f"space.{ratio}", space.expressions[ratio], rule, remedy)


def _require_grid(space: Space) -> None:
    branches = [(key, d) for key, when in space.conditions.items() for d in when.branches.values()]
    for key, distribution in (*space.distributions.items(), *branches):
        if _axis(distribution) is None:
            rule = "a grid needs values that can be counted"
            raise ConfigError(f"space.{key}", space.expressions[key], rule, "Use choice(...) or range(...).")
    if space.num_points is None:
        raise ConfigError(
            "sampler.name", "grid", f"takes up to {MAX_POINTS} combinations", "Use sampler=random."
        )


def _axis(distribution: BaseDistribution) -> list[object] | None:
    """Return the values of one key, None if they cannot be counted."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is None:
        return None
    count = round((high - low) / step) + 1
    return [stepped(low, step, i) for i in range(count)] if count <= MAX_POINTS else None


def _contains(distribution: BaseDistribution, value: object) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if not isinstance(value, (int, float)) or not distribution.low <= value <= distribution.high:
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return math.isclose(steps, round(steps), abs_tol=1e-9)
