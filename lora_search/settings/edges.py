"""Notes on best values at the end of their range, with the override that extends the range."""

import math
from collections.abc import Mapping, Sequence

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lora_search.errors import ConfigError
from lora_search.settings.grammar import stepped
from lora_search.settings.overlay import trial_settings
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import Space

NEAR = 0.1  # share of the range, in its own scale


def edge_notes(config: SweepConfig, space: Space, params: Mapping[str, object]) -> list[str]:
    """Return one line for each searched number whose best value is at an end of its range.

    The same study may widen a range and add choices.
    """
    notes = []
    for key, distribution in space.of(params).items():
        value = params.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or key == "train.seed":
            continue  # seeds have no order
        if isinstance(distribution, CategoricalDistribution):
            found = _choice_note(config, key, [*distribution.choices], value)
        elif isinstance(distribution, FloatDistribution | IntDistribution) and distribution.step in (None, 1):
            found = _range_note(config, key, distribution, value)
        else:
            continue
        notes += [f"{text}: 'space.{key}={_in_place(space, key, params, wide)}'" for text, wide in found]
    return notes


def _in_place(space: Space, key: str, params: Mapping[str, object], wide: str) -> str:
    """Return the wider sweep; of a key that depends on another, with the sweeps for that one's choices."""
    if key not in space.conditions:
        return wide
    when = space.conditions[key]
    mine = params[when.parent]
    pairs = [f"{choice}, {wide if choice == mine else _written(d)}" for choice, d in when.branches.items()]
    return f"when({when.parent}, {', '.join(pairs)})"


def _written(distribution: BaseDistribution) -> str:
    """Return a distribution in Hydra's grammar."""
    if isinstance(distribution, CategoricalDistribution):
        return f"choice({','.join(map(str, distribution.choices))})"
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step not in (None, 1):
        return f"range({low},{stepped(high, step, 1)},{step})"
    return f"tag(log,interval({low},{high}))" if distribution.log else f"interval({low},{high})"


def _range_note(
    config: SweepConfig, key: str, distribution: FloatDistribution | IntDistribution, value: float
) -> list[tuple[str, str]]:
    low, high, log = distribution.low, distribution.high, distribution.log
    place = _place(value, low, high, log=log)
    if NEAR < place < 1 - NEAR:
        return []
    is_low = place <= NEAR
    wider = _beyond(low, high, is_low=is_low, log=log)
    whole = isinstance(distribution, IntDistribution)
    bound = max(1, round(wider)) if whole else float(f"{wider:.3g}")
    ends = (bound, high) if is_low else (low, bound)
    if (ends[0] >= low and ends[1] <= high) or not _is_allowed(config, key, bound):
        return []  # no valid value beyond: a rank of 0, a learning rate of 1
    inner = f"interval({ends[0]},{ends[1]})"
    wide = f"tag(log,{inner})" if log else inner
    text = (
        f"{key}={value:.4g} is at the {'lower' if is_low else 'upper'} end of its range; the best value may "
        "be outside. To extend the range in the same study"
    )
    return [(text, wide)]


def _choice_note(config: SweepConfig, key: str, choices: list[object], value: float) -> list[tuple[str, str]]:
    numbers = sorted(c for c in choices if isinstance(c, int | float) and not isinstance(c, bool))
    if len(numbers) < 2 or len(numbers) < len(choices) or value not in (numbers[0], numbers[-1]):
        return []
    end, word = ("largest", "larger") if value == numbers[-1] else ("smallest", "smaller")
    new = _next_choice(numbers if word == "larger" else numbers[::-1])
    if new in numbers or not _is_allowed(config, key, new):
        return []  # no valid value beyond
    listed = [*numbers, new] if word == "larger" else [new, *numbers]
    wide = f"choice({','.join(map(str, listed))})"
    text = (
        f"{key}={value} is the {end} choice: a {word} one may be better. To extend the choices in the same "
        "study"
    )
    return [(text, wide)]


def _next_choice(numbers: Sequence[float]) -> float:
    """Return the number beyond the last, as far from it as the one before; by ratio, or by even steps."""
    *_, before, last = numbers
    steps = {round(b - a, 12) for a, b in zip(numbers, numbers[1:], strict=False)}
    is_even = len(numbers) > 2 and len(steps) == 1
    new = last + (last - before) if is_even or before == 0 else last * last / before
    return max(1, round(new)) if isinstance(last, int) else float(f"{new:.6g}")


def _place(value: float, low: float, high: float, *, log: bool) -> float:
    """Return the value's position in its range: 0 at the lower end, 1 at the upper."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def _beyond(low: float, high: float, *, is_low: bool, log: bool) -> float:
    """Return a new end that makes the range half as wide again, in its own scale."""
    if log:
        factor = math.sqrt(high / low)
        return low / factor if is_low else high * factor
    half = (high - low) / 2
    return low - half if is_low else high + half


def _is_allowed(config: SweepConfig, key: str, value: object) -> bool:
    try:
        trial_settings(config, {key: value})
    except ConfigError:
        return False
    return True
