"""The searched hyperparameters: Hydra's sweep grammar -> Optuna distributions -> one trial's settings.

`space` mirrors the keys that it searches; null disables one. Every choice and every bound must pass the
rules of its key.
"""

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, QuotedString, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lora_search.errors import ConfigError
from lora_search.settings.overlay import FIXED, _encode, _get, _types, searchable_keys, trial_settings
from lora_search.settings.schema import OptimConfig, SweepConfig
from lora_search.trial import TrialSettings

HINT = "Write choice(8, 16), interval(1e-5, 1e-3), tag(log, interval(1e-5, 1e-3)) or range(8, 33, 8)."
USED_BY = {"min_lr_ratio": ("cosine", "linear", "wsd"), "decay_ratio": ("wsd",)}  # key of optim -> schedules
MAX_POINTS = 10_000  # larger spaces are not enumerated


@dataclass(frozen=True)
class Space:
    """Dotted key -> distribution. A choice that is a list is encoded as JSON."""

    distributions: dict[str, BaseDistribution]
    expressions: dict[str, str]

    def default_params(self, config: SweepConfig) -> dict[str, object] | None:
        """Return the settings outside `space` as a point of the space, or None if one is out of range."""
        return None if self.outside(config) else self.given_params(config)

    def given_params(self, config: SweepConfig) -> dict[str, object]:
        """Return the settings outside `space` that are in the range of their key."""
        outside = self.outside(config)
        return {key: _encode(_get(config, key)) for key in self.distributions if key not in outside}

    def outside(self, config: SweepConfig) -> dict[str, object]:
        """Return the settings outside `space` that are not in the range of their key."""
        given = {key: _get(config, key) for key in self.distributions}
        return {k: v for k, v in given.items() if not _contains(self.distributions[k], _encode(v))}

    def refusal(self, params: Mapping[str, object]) -> str:
        """Return why these parameters are not in the space; "" if they are."""
        for key, value in params.items():
            if key not in self.distributions:
                return f"{key} is not searched"
            if isinstance(value, list | dict) or not _contains(self.distributions[key], value):
                return f"{key}={value} is not in {self.expressions[key]}"
        return ""

    def num_points(self) -> int | None:
        """Return the number of points; None if there are more than MAX_POINTS."""
        axes = [_axis(distribution) for distribution in self.distributions.values()]
        if any(axis is None for axis in axes):
            return None
        count = math.prod(len(axis) for axis in axes if axis is not None)
        return count if count <= MAX_POINTS else None

    def untried(self, tried: Iterable[Mapping[str, object]]) -> list[dict[str, object]] | None:
        """Return the points not in ``tried``, in order; None if the space cannot be enumerated."""
        if self.num_points() is None:
            return None
        seen = {_identity(params) for params in tried}
        axes = [_axis(distribution) or [] for distribution in self.distributions.values()]
        points = (dict(zip(self.distributions, values, strict=True)) for values in itertools.product(*axes))
        return [point for point in points if _identity(point) not in seen]


def parse_space(config: SweepConfig) -> Space:
    """Return the space of a sweep. Raises ConfigError with the key under `space`."""
    expressions = dict(sorted(_flatten(config.space)))
    for key in expressions:
        _require_searchable(key)
    distributions = {key: _distribution(config, key, text) for key, text in expressions.items()}
    space = Space(distributions, expressions)
    if not distributions and config.study.most_trials > 1:
        remedy = "Search something, e.g. space.lora.r=choice(8,16), or set study.n_trials=1."
        raise ConfigError("space", {}, "must search something when study.n_trials is above 1", remedy)
    if config.sampler.name == "grid":
        _require_grid(space)
    _require_effect(config, space)
    return space


def corners(config: SweepConfig, space: Space, keys: Sequence[str]) -> list[TrialSettings]:
    """Return the settings at every combination of the keys' choices and bounds, or fixed values."""
    axes = [_ends(config, space, key) for key in keys]
    points = (dict(zip(keys, values, strict=True)) for values in itertools.product(*axes))
    return [trial_settings(config, point) for point in points]


def _ends(config: SweepConfig, space: Space, key: str) -> list[object]:
    distribution, own = space.distributions.get(key), _encode(_get(config, key))
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, (FloatDistribution, IntDistribution)):
        return [distribution.low, distribution.high]
    return [own]


def largest(config: SweepConfig, space: Space, key: str) -> int:
    """Return the largest value of an integer key."""
    return max(int(end) for end in _ends(config, space, key) if isinstance(end, (int, float)))


def smallest(config: SweepConfig, space: Space, key: str) -> int:
    """Return the smallest value of an integer key."""
    return min(int(end) for end in _ends(config, space, key) if isinstance(end, (int, float)))


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
            raise ConfigError(f"space.{key}", value, "must be a sweep", _as_choice(key, value))
    return leaves


def _as_choice(key: str, value: object) -> str:
    listed = value if isinstance(value, list) else [value]
    text = ", ".join(f"[{','.join(map(str, v))}]" if isinstance(v, list) else str(v) for v in listed)
    return f"Write choice({text}), or put a fixed value at {key} itself."


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


def _distribution(config: SweepConfig, key: str, text: str) -> BaseDistribution:
    full_key = f"space.{key}"
    try:
        sweep = OverridesParser.create().parse_override(f"{key}={text}").value()
    except HydraException as error:
        cause = str(error).splitlines()[0].rpartition("': ")[2]
        raise ConfigError(full_key, text, f"is not in the sweep grammar ({cause})", HINT) from None
    if isinstance(sweep, ChoiceSweep):
        return _choices(config, key, sweep)
    if isinstance(sweep, IntervalSweep):
        return _interval(config, key, sweep)
    if isinstance(sweep, RangeSweep):
        return _range(config, key, sweep)
    if isinstance(sweep, str) and "(" in sweep:
        raise ConfigError(full_key, text, "must be a sweep", "Take one pair of quotes off.")
    is_value = isinstance(sweep, str | int | float | list)
    raise ConfigError(full_key, text, "must be a sweep", _as_choice(key, sweep) if is_value else HINT)


def _choices(config: SweepConfig, key: str, sweep: ChoiceSweep) -> CategoricalDistribution:
    values = [_plain(value) for value in sweep.list]
    if sweep.tags:
        raise ConfigError(f"space.{key}", sorted(sweep.tags), "tags belong to interval(...) only", HINT)
    for value in values:
        _check_value(config, key, value)
    encoded = [_encode(value) for value in values]
    if len({_identity({"": value}) for value in encoded}) < len(encoded):
        raise ConfigError(f"space.{key}", values, "the choices must differ", "Remove the repeated one.")
    return CategoricalDistribution(encoded)  # type: ignore[arg-type]


def _interval(config: SweepConfig, key: str, sweep: IntervalSweep) -> BaseDistribution:
    """Both ends are included. Whole numbers if the key takes no others, or if tagged int."""
    full_key = f"space.{key}"
    unknown = sweep.tags - {"log", "int", "float"}
    if unknown:
        raise ConfigError(full_key, sorted(unknown), "the tags of a sweep are log and int", HINT)
    assert sweep.start is not None
    assert sweep.end is not None  # the grammar asks for both
    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    _require_ordered(full_key, low, high)
    if log and low <= 0:
        raise ConfigError(full_key, low, "a log range must start above 0", "Raise the lower bound.")
    whole = _is_whole(key) or "int" in sweep.tags
    if whole and not (float(low).is_integer() and float(high).is_integer()):
        raise ConfigError(
            full_key, f"interval({low}, {high})", "the bounds must be whole numbers", "Round them."
        )
    low, high = (int(low), int(high)) if whole else (float(low), float(high))
    for bound in (low, high):
        _check_value(config, key, bound)
    return IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(low, high, log=log)


def _range(config: SweepConfig, key: str, sweep: RangeSweep) -> BaseDistribution:
    """The stop is not included, as in Python."""
    full_key, start, stop, step = f"space.{key}", sweep.start, sweep.stop, sweep.step
    assert start is not None
    assert stop is not None  # the grammar sees to both
    if sweep.tags:
        raise ConfigError(full_key, sorted(sweep.tags), "tags belong to interval(...) only", HINT)
    if not 0 < step < math.inf:
        raise ConfigError(full_key, step, "the step must be > 0", "range(start, stop, step) counts upwards.")
    _require_ordered(full_key, start, stop)
    count = math.ceil((stop - start) / step - 1e-9)
    last = _stepped(start, step, count - 1)
    for bound in (start, last):
        _check_value(config, key, bound)
    if all(isinstance(number, int) for number in (start, step)):
        return IntDistribution(int(start), int(last), step=int(step))
    if _is_whole(key):
        raise ConfigError(full_key, step, "the step must be a whole number", "Write range(8, 33, 8).")
    return FloatDistribution(float(start), float(last), step=float(step))


def _require_ordered(full_key: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            full_key, f"low={low}, high={high}", "low < high must hold", "Swap them or widen the range."
        )


def _require_effect(config: SweepConfig, space: Space) -> None:
    """Raise ConfigError for a key that is set or searched and would change no trial."""
    schedules = _ends(config, space, "optim.schedule")
    for name, users in USED_BY.items():
        value, is_searched = getattr(config.optim, name), f"optim.{name}" in space.distributions
        is_given = is_searched or value != getattr(OptimConfig(), name)
        if is_given and not set(users) & set(schedules):
            shown = space.expressions[f"optim.{name}"] if is_searched else value
            rule = f"has no effect with optim.schedule={', '.join(map(str, schedules))}"
            remedy = f"Leave it out, or set optim.schedule={' or '.join(users)}."
            raise ConfigError(f"optim.{name}", shown, rule, remedy)
    ratio, steps = "optim.warmup_ratio", _ends(config, space, "optim.warmup_steps")
    if ratio in space.distributions and None not in steps:
        rule, remedy = (
            "has no effect while optim.warmup_steps is set",
            "Set space.optim.warmup_ratio=null, or",
        )
        remedy += " optim.warmup_steps=null."
        raise ConfigError(f"space.{ratio}", space.expressions[ratio], rule, remedy)


def _require_grid(space: Space) -> None:
    for key, distribution in space.distributions.items():
        if _axis(distribution) is None:
            rule = "a grid needs values that can be counted"
            raise ConfigError(f"space.{key}", space.expressions[key], rule, "Use choice(...) or range(...).")
    if space.num_points() is None:
        raise ConfigError(
            "sampler.name", "grid", f"takes up to {MAX_POINTS} combinations", "Use sampler=random."
        )


def _check_value(config: SweepConfig, key: str, value: object) -> None:
    try:
        trial_settings(config, {key: _encode(value)})
    except ConfigError as error:
        raise ConfigError(f"space.{error.key}", error.value, error.rule, error.remedy) from None


def _is_whole(key: str) -> bool:
    return int in _types(key) and float not in _types(key)


def _plain(value: object) -> object:
    """Return a parsed element of Hydra's grammar as plain Python."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _identity(params: Mapping[str, object]) -> tuple[str, ...]:
    """Return the same tuple for equal points: 8 is 8.0; the last digits of a stepped float are ignored."""
    ordered = (params[key] for key in sorted(params))
    return tuple(
        f"{v:.10g}" if isinstance(v, float | int) and not isinstance(v, bool) else str(v) for v in ordered
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
    return [_stepped(low, step, i) for i in range(count)] if count <= MAX_POINTS else None


def _stepped(start: float, step: float, count: int) -> float:
    """Return start + count * step in decimal arithmetic: 0.15, not 0.15000000000000002."""
    if isinstance(start, int) and isinstance(step, int):
        return start + count * step
    return float(Decimal(str(start)) + count * Decimal(str(step)))


def _contains(distribution: BaseDistribution, value: object) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if not isinstance(value, (int, float)) or not distribution.low <= value <= distribution.high:
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return math.isclose(steps, round(steps), abs_tol=1e-9)
