"""The searched hyperparameters: Hydra's sweep grammar -> Optuna distributions -> one trial's settings.

`space` mirrors the keys it searches. Every choice and every bound is checked by the rules of the key itself.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, QuotedString, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lora_search.config import ALL_LINEAR, LoraConfig, OptimConfig, SweepConfig, TrainConfig
from lora_search.errors import ConfigError
from lora_search.trial import TrialSettings

SECTIONS: dict[str, type] = {"lora": LoraConfig, "optim": OptimConfig, "train": TrainConfig}
FIXED = ("train.evals_per_epoch",)  # all trials must meet at the same rungs
HINT = "Write choice(8, 16), interval(1e-5, 1e-3), tag(log, interval(1e-5, 1e-3)) or range(8, 33, 8)."


@dataclass(frozen=True)
class Space:
    """Dotted key -> distribution. Lists are choices written as JSON."""

    distributions: dict[str, BaseDistribution]
    expressions: dict[str, str]

    def default_params(self, config: SweepConfig) -> dict[str, object] | None:
        """Return the settings outside `space` as a point of the space, or None where one lies outside."""
        params = {key: _encode(_get(config, key)) for key in self.distributions}
        inside = all(_contains(distribution, params[key]) for key, distribution in self.distributions.items())
        return params if inside else None


def parse_space(config: SweepConfig) -> Space:
    """Return the space of a sweep. Raises ConfigError naming the key under `space`."""
    expressions = dict(sorted(_flatten(config.space)))
    for key in expressions:
        _require_searchable(key)
    distributions = {key: _distribution(config, key, text) for key, text in expressions.items()}
    return Space(distributions, expressions)


def trial_settings(config: SweepConfig, params: Mapping[str, object]) -> TrialSettings:
    """Return what one trial trains: the sweep's settings with its parameters laid over."""
    lora, optim, train = (_overlay(config, section, params) for section in ("lora", "optim", "train"))
    assert isinstance(lora, LoraConfig) and isinstance(optim, OptimConfig) and isinstance(train, TrainConfig)
    targets = (ALL_LINEAR,) if lora.target_modules == ALL_LINEAR else tuple(lora.target_modules)
    return TrialSettings(
        r=lora.r, alpha=lora.alpha_for_rank(lora.r), dropout=lora.dropout,
        target_modules=targets, use_rslora=lora.use_rslora,
        lr=optim.lr, weight_decay=optim.weight_decay, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps,
        max_grad_norm=optim.max_grad_norm, schedule=optim.schedule,  # type: ignore[arg-type]  # checked by OptimConfig
        warmup_ratio=optim.warmup_ratio, batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps, epochs=train.epochs,
        evals_per_epoch=train.evals_per_epoch, early_stopping_patience=train.early_stopping_patience,
    )  # fmt: skip


def possible_targets(config: SweepConfig, space: Space) -> list[tuple[str, ...]]:
    """Return every value that lora.target_modules may take."""
    distribution = space.distributions.get("lora.target_modules")
    choices = distribution.choices if isinstance(distribution, CategoricalDistribution) else [None]
    params: list[dict[str, object]] = [{} if c is None else {"lora.target_modules": c} for c in choices]
    return [trial_settings(config, p).target_modules for p in params]


def largest(config: SweepConfig, space: Space, key: str) -> int:
    """Return the largest integer that the key may take."""
    distribution = space.distributions.get(key)
    if isinstance(distribution, CategoricalDistribution):
        return max(int(choice) for choice in distribution.choices if isinstance(choice, (int, float)))
    if isinstance(distribution, IntDistribution):
        return distribution.high
    value = _get(config, key)
    assert isinstance(value, int)
    return value


def _flatten(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    leaves: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves += _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            leaves.append((f"{prefix}{name}", value))
        elif value is not None:
            raise ConfigError(f"space.{prefix}{name}", value, "must be a sweep", HINT)
    return leaves


def _require_searchable(key: str) -> None:
    searchable = [f"{s}.{f.name}" for s, cls in SECTIONS.items() for f in fields(cls)]
    if key in searchable and key not in FIXED:
        return
    near = [k for k in difflib.get_close_matches(key, searchable, n=3) if k not in FIXED]
    remedy = f"Did you mean space.{near[0]}?" if near else "Keys of lora, optim and train can be searched."
    raise ConfigError(f"space.{key}", key, "is not a setting that can be searched", remedy)


def _distribution(config: SweepConfig, key: str, text: str) -> BaseDistribution:
    full_key = f"space.{key}"
    try:
        sweep = OverridesParser.create().parse_override(f"{key}={text}").value()
    except HydraException:
        raise ConfigError(full_key, text, "is not in the sweep grammar", HINT) from None
    if isinstance(sweep, ChoiceSweep):
        return _choices(config, key, sweep)
    if isinstance(sweep, (IntervalSweep, RangeSweep)):
        return _numbers(config, key, sweep)
    raise ConfigError(full_key, text, "must be a sweep", f"{HINT} A fixed value goes to {key} itself.")


def _choices(config: SweepConfig, key: str, sweep: ChoiceSweep) -> CategoricalDistribution:
    values = [_encode(_plain(value)) for value in sweep.list]
    if len(set(map(str, values))) < len(values):
        raise ConfigError(f"space.{key}", values, "the choices must differ", "Take the repeated one out.")
    for value in values:
        _check_value(config, key, value)
    return CategoricalDistribution(values)  # type: ignore[arg-type]


def _numbers(config: SweepConfig, key: str, sweep: IntervalSweep | RangeSweep) -> BaseDistribution:
    full_key, log = f"space.{key}", "log" in sweep.tags
    low, high = (sweep.start, sweep.end) if isinstance(sweep, IntervalSweep) else (sweep.start, sweep.stop)
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        raise ConfigError(full_key, f"{low}, {high}", "both bounds must be numbers", HINT)
    if low >= high:
        raise ConfigError(
            full_key, f"low={low:g}, high={high:g}", "low < high must hold", "Swap them or widen the range."
        )
    if log and low <= 0:
        raise ConfigError(full_key, low, "a log range must start above 0", "Raise the lower bound.")
    step = sweep.step if isinstance(sweep, RangeSweep) else None
    if step is not None and step <= 0:
        raise ConfigError(full_key, step, "the step must be > 0", "range(start, stop, step) goes upwards.")
    whole = isinstance(_get(config, key), int) or "int" in sweep.tags
    if whole and step is not None:
        span = int(high) - 1 - int(low)
        result: BaseDistribution = IntDistribution(
            int(low), int(low) + span // int(step) * int(step), step=int(step)
        )
    elif whole:
        result = IntDistribution(int(low), int(high), log=log)
    else:
        result = FloatDistribution(
            float(low), float(high), log=log, step=float(step) if step is not None else None
        )
    for bound in (result.low, result.high):  # type: ignore[attr-defined]
        _check_value(config, key, bound)
    return result


def _check_value(config: SweepConfig, key: str, value: object) -> None:
    try:
        trial_settings(config, {key: value})
    except ConfigError as error:
        raise ConfigError(f"space.{key}", value, f"must be a value that {key} can take ({error})") from None


def _overlay(config: SweepConfig, section: str, params: Mapping[str, object]) -> object:
    base = getattr(config, section)
    mine = {k.partition(".")[2]: _decode(v) for k, v in params.items() if k.startswith(f"{section}.")}
    for name, value in mine.items():
        expected = type(getattr(base, name))
        if expected in (int, float, bool) and (
            isinstance(value, bool) != (expected is bool) or isinstance(value, str)
        ):
            raise ConfigError(f"{section}.{name}", value, f"must be of type {expected.__name__}")
        if expected is int and value != int(value):
            raise ConfigError(f"{section}.{name}", value, "must be a whole number")
    return replace(base, **mine)


def _get(config: SweepConfig, key: str) -> object:
    section, _, name = key.partition(".")
    value: object = getattr(getattr(config, section), name)
    return value


def _plain(value: object) -> object:
    """Return Hydra's parsed element as plain Python."""
    if isinstance(value, QuotedString):
        return value.text
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _encode(value: object) -> object:
    return json.dumps(value) if isinstance(value, list) else value


def _decode(value: object) -> object:
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


def _contains(distribution: BaseDistribution, value: object) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if not isinstance(value, (int, float)) or not distribution.low <= value <= distribution.high:
        return False
    return distribution.step is None or (value - distribution.low) % distribution.step == 0
