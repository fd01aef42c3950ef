"""The formatting of values, the same for screen, report and files. Pure."""

import json
import math
from collections.abc import Sequence


def short_names(keys: Sequence[str]) -> list[str]:
    """Return the last part of each dotted key, or the whole key where that would be ambiguous."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for name, key in zip(last, keys, strict=True)]


def show_change(base_perplexity: float, perplexity: float | None, error: float = 0.0) -> str:
    """Return the change against the base model, to the digits that its standard error supports: -31.8 %."""
    if perplexity is None or not math.isfinite(perplexity) or not 0 < base_perplexity < math.inf:
        return "-"
    return f"{100 * (perplexity / base_perplexity - 1):+.{min(1, percent_places(error))}f} %"


def show_difference(change: float, error: float) -> str:
    """Return a relative difference with its standard error, to the digits that it supports: +1.2 ± 0.9 %."""
    places = percent_places(error)
    return f"{100 * change:+.{places}f} ± {100 * error:.{places}f} %"


def percent_places(error: float) -> int:
    """Return how many decimals of a percentage its standard error supports, at most 2; 1 for none."""
    return 1 if error <= 0 else min(2, max(0, math.ceil(-math.log10(100 * error))))


def show_perplexity(perplexity: float | None, places: int | None = None) -> str:
    """Return four or five significant digits: 8.123, 412.7, 1.30e+06; no more decimals than ``places``."""
    if perplexity is None:
        return "-"
    if not math.isfinite(perplexity) or perplexity >= 10_000:
        return f"{perplexity:.2e}"
    most = 3 if perplexity < 100 else 1
    return f"{perplexity:.{most if places is None else min(most, places)}f}"


def show_value(value: object) -> str:
    """Return a setting for display: 2.1e-4, 16; layers abbreviated: q,v for q_proj and v_proj."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return show_float(value)
    if isinstance(value, list | tuple):
        return ",".join(show_value(item) for item in value)
    if isinstance(value, str) and value.startswith('["'):  # the study keeps a list as JSON
        return show_value(json.loads(value))
    return str(value).removesuffix("_proj")


def show_float(value: float) -> str:
    if value == 0 or not math.isfinite(value) or 1e-2 <= abs(value) < 1e6:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def show_seconds(seconds: float) -> str:
    """Return 0:07, 3:12 or 1:03:12."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_count(count: float) -> str:
    """Return 950, 12.3 k or 4.56 M."""
    if count < 1_000:
        return f"{count:.0f}"
    return f"{count / 1_000:.1f} k" if count < 1_000_000 else f"{count / 1_000_000:.2f} M"
