"""The text of one searched key in Hydra's sweep grammar -> Optuna's distribution; and values as its text.

Beside Hydra's functions there is `when(KEY, CHOICE, SWEEP, ...)`: a sweep for some choices of another key.
Every choice and every bound must pass the rules of its key.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Quote,
    QuotedString,
    RangeSweep,
    Sweep,
)
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)

from lora_search.errors import ConfigError
from lora_search.settings.overlay import declared_types, encoded, searchable_keys, trial_settings
from lora_search.settings.rules import require
from lora_search.settings.schema import SweepConfig

ESCAPED = re.compile(r"([\\()\[\]{}:=, \t])")  # in a mapping's key, which takes no quotes
HINT = "Write choice(8, 16), interval(1e-5, 1e-3), tag(log, interval(1e-5, 1e-3)) or range(8, 33, 8)."
WHEN = (
    "Write when(lora.target_modules, all-linear, interval(1e-5, 1e-3)): a key, then choices of it, each "
    "with its sweep."
)


Check = Callable[[object], None]  # raises ConfigError where a value breaks a rule of its key


@dataclass(frozen=True)
class When:
    """A searched key that depends on another: a distribution for some choices of that key."""

    parent: str
    branches: Mapping[object, BaseDistribution]  # by the encoded choice


@dataclass(frozen=True)
class WhenCall:
    """`when(KEY, CHOICE, SWEEP, ...)` as it was typed."""

    parent: object
    branches: tuple[object, ...]


def _when(key: Any, *branches: Any) -> WhenCall:
    return WhenCall(key, branches)


def make_parser() -> OverridesParser:
    """Return Hydra's parser of overrides, with `when`."""
    functions = create_functions()
    functions.register("when", _when)
    return OverridesParser(functions)


def read_key(config: SweepConfig, key: str, text: str) -> BaseDistribution | WhenCall:
    """Return what the text of a searched key says. Raises ConfigError with the key under `space`."""
    try:
        sweep = make_parser().parse_override(f"{key}={text}").value()
    except HydraException as error:
        raise unreadable(f"space.{key}", text, error) from None
    return sweep if isinstance(sweep, WhenCall) else _distribution(config, key, sweep, text)


def unreadable(full_key: str, text: str, error: HydraException) -> ConfigError:
    """Return the error for a sweep that the parser cannot read."""
    cause = str(error).splitlines()[0].rpartition("': ")[2]
    if WhenCall.__name__ in cause:
        cause = "no function may contain when(...); its sweeps may have tags"
    hint = WHEN if "when(" in text else HINT
    return ConfigError(full_key, text, f"is not in the sweep grammar ({cause})", hint)


def resolve(
    config: SweepConfig, key: str, text: str, call: WhenCall, searched: Mapping[str, BaseDistribution]
) -> When:
    """Return the branches of a key that depends on one of those ``searched``. Raises ConfigError."""
    full_key, branches = f"space.{key}", dict[object, BaseDistribution]()
    is_paired = bool(call.branches) and len(call.branches) % 2 == 0
    require(is_paired, full_key, text, "must pair choices and sweeps", WHEN)
    parent, choices = _parent(key, text, call, searched)
    for value, sweep in zip(call.branches[::2], call.branches[1::2], strict=True):
        if isinstance(value, Sweep | WhenCall):
            rule = f"must have a choice of {parent}, not a sweep, before each sweep"
            raise ConfigError(full_key, text, rule, WHEN)
        typed = without_quotes(value)
        choice = _own_choice(full_key, parent, typed, choices)
        is_new = choice not in branches
        require(is_new, full_key, typed, "the choices must differ", "Remove the repeated one.")
        branches[choice] = _distribution(config, key, sweep, text, {parent: choice})
    first = next(iter(branches.values()))
    for other in branches.values():
        _require_alike(full_key, text, first, other)
    return When(parent, branches)


def _parent(
    key: str, text: str, call: WhenCall, searched: Mapping[str, BaseDistribution]
) -> tuple[str, CategoricalDistribution]:
    """Return the key that ``key`` depends on, and its choices. Raises ConfigError."""
    full_key, parent = f"space.{key}", without_quotes(call.parent)
    if not isinstance(parent, str):
        raise ConfigError(full_key, text, "must begin with the name of a searched key", WHEN)
    if parent == key:
        raise ConfigError(full_key, parent, "cannot depend on itself", "Name another searched key.")
    choices = searched.get(parent)
    if isinstance(choices, CategoricalDistribution):
        return parent, choices
    remedy = f"Search {parent} by choice(...), without when(...)."
    if parent not in searchable_keys():
        near = difflib.get_close_matches(parent, searchable_keys(), n=1)
        remedy = f"Did you mean {near[0]}?" if near else "Keys of lora, optim and train can be searched."
    raise ConfigError(full_key, parent, "must depend on a key that is searched by choice(...)", remedy)


def _own_choice(full_key: str, parent: str, value: object, choices: CategoricalDistribution) -> object:
    """Return the encoded choice of the parent that the value is: 8 for 8.0. Raises ConfigError."""
    same = [c for c in choices.choices if identity({"": c}) == identity({"": encoded(value)})]
    rule = f"must be a choice of {parent}: {', '.join(map(str, choices.choices))}"
    require(bool(same), full_key, value, rule, "Write it as it is there; a list in the same order.")
    return same[0]


def _require_alike(full_key: str, text: str, first: BaseDistribution, other: BaseDistribution) -> None:
    """A study has one list of choices per key, and one kind of range."""
    try:
        check_distribution_compatibility(first, other)
    except ValueError:
        rule = "its sweeps must be of one kind, with the same choices"
        remedy = "Write interval(...) or range(...) for numbers that differ, all with log or all without."
        raise ConfigError(full_key, text, rule, remedy) from None


def _distribution(
    config: SweepConfig, key: str, sweep: object, text: str, given: Mapping[str, object] | None = None
) -> BaseDistribution:
    def check(value: object) -> None:
        try:
            trial_settings(config, {**(given or {}), key: encoded(value)})
        except ConfigError as error:
            raise ConfigError(f"space.{error.key}", error.value, error.rule, error.remedy) from None

    if isinstance(sweep, ChoiceSweep):
        return _choices(check, key, sweep)
    if isinstance(sweep, IntervalSweep):
        return _interval(check, key, sweep)
    if isinstance(sweep, RangeSweep):
        return _range(check, key, sweep)
    full_key = f"space.{key}"
    if isinstance(sweep, str) and "(" in sweep:
        raise ConfigError(full_key, text, "must be a sweep", "Take one pair of quotes off.")
    is_value = isinstance(sweep, str | int | float | list)
    raise ConfigError(full_key, text, "must be a sweep", as_choice(key, sweep) if is_value else HINT)


def as_choice(key: str, value: object) -> str:
    listed = value if isinstance(value, list) else [value]
    text = ", ".join(f"[{','.join(map(str, v))}]" if isinstance(v, list) else str(v) for v in listed)
    return f"Write choice({text}), or put a fixed value at {key} itself."


def _choices(check: Check, key: str, sweep: ChoiceSweep) -> CategoricalDistribution:
    values = [without_quotes(value) for value in sweep.list]
    if sweep.tags:
        raise ConfigError(f"space.{key}", sorted(sweep.tags), "tags belong to interval(...) only", HINT)
    for value in values:
        check(value)
    choices = [encoded(value) for value in values]
    if len({identity({"": value}) for value in choices}) < len(choices):
        raise ConfigError(f"space.{key}", values, "the choices must differ", "Remove the repeated one.")
    return CategoricalDistribution(choices)  # type: ignore[arg-type]


def _interval(check: Check, key: str, sweep: IntervalSweep) -> BaseDistribution:
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
    whole = is_whole_number(key) or "int" in sweep.tags
    if whole and not (float(low).is_integer() and float(high).is_integer()):
        raise ConfigError(
            full_key, f"interval({low}, {high})", "the bounds must be whole numbers", "Round them."
        )
    low, high = (int(low), int(high)) if whole else (float(low), float(high))
    for bound in (low, high):
        check(bound)
    return IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(low, high, log=log)


def _range(check: Check, key: str, sweep: RangeSweep) -> BaseDistribution:
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
    last = stepped(start, step, count - 1)
    for bound in (start, last):
        check(bound)
    if all(isinstance(number, int) for number in (start, step)):
        return IntDistribution(int(start), int(last), step=int(step))
    if is_whole_number(key):
        raise ConfigError(full_key, step, "the step must be a whole number", "Write range(8, 33, 8).")
    return FloatDistribution(float(start), float(last), step=float(step))


def _require_ordered(full_key: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            full_key, f"low={low}, high={high}", "low < high must hold", "Swap them or widen the range."
        )


def is_whole_number(key: str) -> bool:
    return int in declared_types(key) and float not in declared_types(key)


def without_quotes(value: object) -> object:
    """Return a parsed element of Hydra's grammar as plain Python."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, dict):
        return {str(without_quotes(key)): without_quotes(item) for key, item in value.items()}
    return [without_quotes(item) for item in value] if isinstance(value, list) else value


def identity(params: Mapping[str, object]) -> tuple[str, ...]:
    """Return the same tuple for equal points: 8 is 8.0; the last digits of a stepped float are ignored."""
    numbers = {k for k, v in params.items() if isinstance(v, float | int) and not isinstance(v, bool)}
    return tuple(f"{k}={v:.10g}" if k in numbers else f"{k}={v}" for k, v in sorted(params.items()))


def stepped(start: float, step: float, count: int) -> float:
    """Return start + count * step in decimal arithmetic: 0.15, not 0.15000000000000002."""
    if isinstance(start, int) and isinstance(step, int):
        return start + count * step
    return float(Decimal(str(start)) + count * Decimal(str(step)))


def as_text(value: object) -> str:
    """Return a value in Hydra's grammar: [q_proj,v_proj], {q_proj:8}, null, 2.5e-05, 'a text, quoted'."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, dict):
        pairs = [(ESCAPED.sub(r"\\\1", key), as_text(item)) for key, item in value.items()]
        return "{" + ",".join(f"{key}:{item}" for key, item in pairs) + "}"
    return quoted(value) if isinstance(value, str) and not _is_word(value) else str(value)


def quoted(text: str, mark: Quote = Quote.single) -> str:
    """Return the text in quotes, as Hydra's grammar reads it back."""
    return str(QuotedString(text, mark).with_quotes())


def _is_word(text: str) -> bool:
    """Return whether Hydra's grammar reads the text as itself: null, true and 1e-3 it does not."""
    is_simple = re.fullmatch(r"[A-Za-z_][\w.-]*", text) is not None
    return is_simple and OverridesParser.create().parse_override(f"key={text}").value() == text
