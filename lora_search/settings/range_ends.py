"""Notes on best values at the end of their range, with the override that extends the range."""

import math
import shlex
from collections.abc import Mapping, Sequence

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lora_search.errors import ConfigError
from lora_search.settings.grammar import WhenCall, as_text, is_whole_number, read_key, resolve, stepped
from lora_search.settings.overlay import decoded
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import Space

NEAR = 0.1  # share of the range, in its own scale
Wider = tuple[str, BaseDistribution]  # what is said, and what the key could be searched over


def edge_notes(config: SweepConfig, space: Space, params: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return, for each searched number whose best value is at an end of its range, a note and the override
    that extends the range, quoted for the shell.

    The same study may widen a range and add choices.
    """
    notes = []
    for key, distribution in space.of(params).items():
        value = params.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or key == "train.seed":
            continue  # seeds have no order
        if isinstance(distribution, CategoricalDistribution):
            found = _choice_note(key, distribution, value)
        elif isinstance(distribution, FloatDistribution | IntDistribution):
            found = _range_note(key, distribution, value)
        else:
            continue
        if found is not None:
            text, wide = found
            sweep = _in_place(space, key, params, wide)
            if _is_allowed(config, space, key, sweep):  # not a rank of 0, a learning rate of 1
                notes.append((text, shlex.quote(f"space.{key}={sweep}")))
    return notes


def _in_place(space: Space, key: str, params: Mapping[str, object], wide: BaseDistribution) -> str:
    """Return the wider sweep; of a key that depends on another, with the sweeps for that one's choices, which
    must all have the same choices."""
    if key not in space.conditions:
        return _written(key, wide)
    when = space.conditions[key]
    branches = {**when.branches, params[when.parent]: wide}
    if isinstance(wide, CategoricalDistribution):
        branches = dict.fromkeys(branches, wide)
    pairs = [f"{as_text(decoded(choice))}, {_written(key, d)}" for choice, d in branches.items()]
    return f"when({when.parent}, {', '.join(pairs)})"


def _written(key: str, distribution: BaseDistribution) -> str:
    """Return a distribution in Hydra's grammar."""
    if isinstance(distribution, CategoricalDistribution):
        return f"choice({','.join(as_text(decoded(choice)) for choice in distribution.choices)})"
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is not None and _steps(distribution):
        return f"range({low},{stepped(high, step, 1)},{step})"
    is_tagged = isinstance(distribution, IntDistribution) and not is_whole_number(key)
    tags = ["int"] * is_tagged + ["log"] * distribution.log
    return f"tag({','.join(tags)},interval({low},{high}))" if tags else f"interval({low},{high})"


def _steps(distribution: FloatDistribution | IntDistribution) -> bool:
    """Return whether the values are further apart than the kind of number makes them."""
    return distribution.step != (1 if isinstance(distribution, IntDistribution) else None)


def _range_note(key: str, distribution: FloatDistribution | IntDistribution, value: float) -> Wider | None:
    low, high, log = distribution.low, distribution.high, distribution.log
    place = _place(value, low, high, log=log)
    if NEAR < place < 1 - NEAR:
        return None
    is_low = place <= NEAR
    bound = _bound(distribution, _beyond(low, high, is_low=is_low, log=log), is_low=is_low)
    ends = (bound, high) if is_low else (low, bound)
    if ends[0] >= low and ends[1] <= high:
        return None
    text = (
        f"{key}={value:.4g} is at the {'lower' if is_low else 'upper'} end of its range; the best value may "
        "be outside. To extend the range in the same study"
    )
    return text, type(distribution)(ends[0], ends[1], log=log, step=distribution.step)  # type: ignore[arg-type]


def _bound(distribution: FloatDistribution | IntDistribution, wider: float, *, is_low: bool) -> float:
    """Return the new end as one types it; of a stepped range on its grid, and above 0 if the old one is."""
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is not None and _steps(distribution):
        above_0 = math.ceil(round(low / step, 9)) - 1
        down = round((low - wider) / step)
        count = (
            -min(max(1, down), above_0 if low > 0 else down)
            if is_low
            else max(1, round((wider - high) / step))
        )
        return stepped(low if is_low else high, step, count)
    return max(1, round(wider)) if isinstance(distribution, IntDistribution) else float(f"{wider:.3g}")


def _choice_note(key: str, distribution: CategoricalDistribution, value: float) -> Wider | None:
    choices = distribution.choices
    numbers = sorted(c for c in choices if isinstance(c, int | float) and not isinstance(c, bool))
    if len(numbers) < 2 or len(numbers) < len(choices) or value not in (numbers[0], numbers[-1]):
        return None
    is_largest = value == numbers[-1]
    new = _next_choice(numbers if is_largest else numbers[::-1])
    if (new <= value) if is_largest else (new >= value):
        return None
    end, word = ("largest", "larger") if is_largest else ("smallest", "smaller")
    text = (
        f"{key}={value} is the {end} choice: a {word} one may be better. To extend the choices in the same "
        "study"
    )
    return text, CategoricalDistribution([*numbers, new] if is_largest else [new, *numbers])


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


def _is_allowed(config: SweepConfig, space: Space, key: str, sweep: str) -> bool:
    try:
        found = read_key(config, key, sweep)
        if isinstance(found, WhenCall):
            resolve(config, key, sweep, found, space.distributions)
    except ConfigError:
        return False
    return True
