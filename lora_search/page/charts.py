"""The report's charts: SVG whose colours are the page's (Okabe and Ito's, safe for colour-blind readers) and
whose shapes say the same again. They print, scale, and need no script. Pure."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lora_search.results.formatting import show_float, show_perplexity, show_value
from lora_search.trial import TrialRow

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 44
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
MAX_CATEGORIES = 6  # numbers with up to this many values are drawn as choices
LOG_RATIO = 5.0  # values that spread further than this get a log axis
WIDE, NARROW, HIGH, LOW = 1040, 420, 400, 260
MOST_TEXTS = 150
SMALL = {  # of many trials: crosses, diamonds, else dots
    "pruned": "m-3-3l6 6m0-6l-6 6",
    "failed": "m0-3l3 3l-3 3l-3-3z",
    "complete": "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
}
ALONE = """<style>svg { background:#fff; } text { font:13px system-ui,sans-serif; fill:#4a5562; }
.grid { stroke:#d5dbe2; } .line, .mark { fill:none; stroke:#0072b2; stroke-width:1.8; }
.line.best { stroke-width:3.4; } .line.base { stroke:#4a5562; stroke-width:1; stroke-dasharray:6 4; }
.line.best, .mark.best { stroke:#007a5a; } .mark.best { fill:#007a5a; } .mark.complete { fill:#0072b2; }
.line.pruned, .mark.pruned, .line.failed, .mark.failed { stroke:#b34e00; }</style>"""  # as the page prints
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "WAITING": "waiting"}


@dataclass(frozen=True)
class Axis:
    """From values to pixels. ``names``: the places of categories, one unit apart."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    names: tuple[str, ...] = ()

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the values to mark, with their labels."""
        if self.names:
            return [(float(i), name) for i, name in enumerate(self.names)]
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            parts = (1, 2, 5) if self.high / self.low < 200 else (1,)
            values = [part * 10.0**decade for decade in decades for part in parts]
        else:
            step = _step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            values = [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [(v, show_float(v)) for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]


def learning_curves(
    rows: Sequence[TrialRow], best: TrialRow | None, base_perplexity: float, evals_per_epoch: int | None
) -> str:
    """Return the perplexity of every trial over the data it has seen, from the untrained base model on."""
    rungs = evals_per_epoch or 1
    curves = [(row, curve) for row in rows if (curve := curve_of(row, base_perplexity))]
    longest = max((rung for _, curve in curves for rung, _ in curve), default=1)
    x = axis_over([0.0, longest / rungs], LEFT, WIDE - RIGHT, from_zero=True)
    y = value_axis([value for _, curve in curves for _, value in curve], base_perplexity, HIGH)
    marks = base_line(y, base_perplexity, WIDE)
    order = sorted(curves, key=lambda pair: (pair[0] is best, pair[0].state == "COMPLETE"))
    drawn = [(row, [(x.at(rung / rungs), y.at(value)) for rung, value in curve]) for row, curve in order]
    marks += [line(points, kind_of(row, best)) for row, points in drawn]
    marks += all_marks([(row, *points[-1]) for row, points in drawn], best, None)
    titles = ("epochs of examples seen" if evals_per_epoch else "rung", "validation perplexity")
    label = f"Learning curves of {len(curves)} trials: validation perplexity over epochs"
    return chart(WIDE, HIGH, label, x, y, titles, marks)


def curve_file(row: TrialRow, best: TrialRow | None, base_perplexity: float) -> str:
    """Return an SVG file with the learning curve of one trial, beside the best one's."""
    shown = [row] if best is None or row.number == best.number else [row, best]
    picture = learning_curves(shown, best, base_perplexity, None)
    head, _, body = picture.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{ALONE}{body}'


def parameter_chart(rows: Sequence[TrialRow], best: TrialRow | None, base_perplexity: float, key: str) -> str:
    """Return best perplexity against one searched setting; crosses did not run to their end."""
    measured = [row for row in rows if row.perplexity is not None and key in row.params]
    measured = [row for row in measured if math.isfinite(row.perplexity or math.nan)]
    y = value_axis([row.perplexity for row in measured if row.perplexity], base_perplexity, LOW)
    values = [row.params[key] for row in measured]
    x, places = setting_axis(values, LEFT, NARROW - RIGHT)
    marks = base_line(y, base_perplexity, NARROW)
    pairs = sorted(zip(measured, places, strict=True), key=lambda pair: pair[0] is best)
    marks += all_marks(
        [(row, x.at(place), y.at(row.perplexity or base_perplexity)) for row, place in pairs], best, [key]
    )
    label = f"Lowest perplexity of {len(measured)} trials against {key}"
    return chart(NARROW, LOW, label, x, y, (key, "perplexity"), marks)


def setting_axis(values: Sequence[object], start: float, end: float) -> tuple[Axis, list[float]]:
    """Return the axis of a searched setting, and where on it each value is: categories one unit apart."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if numbers and len(numbers) == len(values) and len(set(numbers)) > MAX_CATEGORIES:
        spread = max(numbers) / min(numbers) if min(numbers) > 0 else 0.0
        return axis_over(numbers, start, end, is_log=spread > LOG_RATIO), numbers
    names = list(dict.fromkeys(show_value(value) for value in sorted(values, key=choice_order)))
    axis = Axis(-0.5, max(1, len(names)) - 0.5, start, end, names=tuple(names) or ("-",))
    return axis, [float(names.index(show_value(value))) for value in values]


def curve_of(row: TrialRow, base_perplexity: float) -> list[tuple[int, float]]:
    """Return (rung, perplexity) from the base on; empty before the first rung."""
    finite = [(rung, value) for rung, value in row.perplexities.items() if math.isfinite(value)]
    start = [(0, base_perplexity)] if math.isfinite(base_perplexity) else []
    return [*start, *finite] if finite else []


def value_axis(values: Sequence[float], base_perplexity: float, height: int) -> Axis:
    """Return the axis of perplexities: far outliers turn it into a log axis."""
    shown = [v for v in (*values, base_perplexity) if math.isfinite(v) and v > 0] or [1.0]
    is_log = max(shown) / min(shown) > LOG_RATIO
    return axis_over(shown, height - BOTTOM, TOP, is_log=is_log)


def base_line(y: Axis, base_perplexity: float, width: int) -> list[str]:
    """Return the dashed line of the base with its name."""
    if not math.isfinite(base_perplexity):
        return []
    height = y.at(base_perplexity)
    name = f"base model {show_perplexity(base_perplexity)}"
    return [
        line([(LEFT, height), (width - RIGHT, height)], "base"),
        f'<text x="{width - RIGHT}" y="{height + 15:.1f}" text-anchor="end">{name}</text>',
    ]


def kind_of(row: TrialRow, best: TrialRow | None) -> str:
    return "best" if row is best else STATES.get(row.state, "running")


def describe(row: TrialRow, perplexity: float | None, keys: Sequence[str] | None = None) -> str:
    """Return what the pointer shows of a trial, with all its parameters or those that are named."""
    shown = row.params if keys is None else {key: row.params[key] for key in keys}
    params = ", ".join(f"{key} {show_value(value)}" for key, value in shown.items())
    return f"trial {row.number}, {row.state.lower()}: perplexity {show_perplexity(perplexity)}; {params}"


def choice_order(value: object) -> tuple[int, float, str]:
    """Sort numbers by size, before texts."""
    return (
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, json.dumps(value, default=str))
    )


def axis_over(
    values: Sequence[float], start: float, end: float, *, is_log: bool = False, from_zero: bool = False
) -> Axis:
    """Return an axis with a little room around the values."""
    low, high = min(values), max(values)
    if is_log:
        room = (high / low) ** 0.06 if high > low else 1.5
        return Axis(low / room, high * room, start, end, is_log=True)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(0.0 if from_zero else low - room, high + room, start, end)


def chart(
    width: int, height: int, label: str, x: Axis, y: Axis, titles: tuple[str, str], marks: Sequence[str]
) -> str:
    """Return the chart: grid, labels, titles of the axes, then the marks. ``label``: what a screen reader
    says."""
    grid = [
        f'<path class="grid" d="M{LEFT} {y.at(v):.1f}H{width - RIGHT}"/>'
        f'<text x="{LEFT - 7}" y="{y.at(v) + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        for v, name in y.ticks()
    ]
    grid += [
        f'<path class="grid" d="M{x.at(v):.1f} {TOP}V{height - BOTTOM}"/>'
        f'<text x="{x.at(v):.1f}" y="{height - BOTTOM + 17}" text-anchor="middle">{escape(name)}</text>'
        for v, name in x.ticks()
    ]
    middle = (LEFT + width - RIGHT) / 2
    names = (
        f'<text x="{middle:.0f}" y="{height - 6}" text-anchor="middle">{escape(titles[0])}</text>'
        f'<text transform="translate(13 {(TOP + height - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(titles[1])}</text>"
    )
    body = "".join([*grid, names, *marks])
    return svg(width, height, label, [body])


def svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """Return a picture; ``label``: for screen readers."""
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def line(points: Sequence[tuple[float, float]], kind: str) -> str:
    """Return a line through pixels, looking as its class says."""
    path = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    return f'<path class="line {kind}" d="M{path}"/>'


def mark(px: float, py: float, kind: str, text: str, size: float = 5.0) -> str:
    """Return a mark whose shape repeats its colour's meaning, with its text for pointer and screen reader."""
    s = size
    shapes = {
        "pruned": f'<path d="M{-s} {-s}L{s} {s}M{-s} {s}L{s} {-s}"/>',
        "failed": f'<path d="M0 {-s}L{s} 0L0 {s}L{-s} 0Z"/>',
        "waiting": f'<rect x="{-s}" y="{-s}" width="{2 * s}" height="{2 * s}"/>',
        "best": f'<path d="{_star(s * 1.7)}"/>',
    }
    shape = shapes.get(kind, f'<circle r="{s}"/>')
    title = f"<title>{escape(text)}</title>"
    return f'<g class="mark {kind}" transform="translate({px:.1f} {py:.1f})">{title}{shape}</g>'


def all_marks(
    places: Sequence[tuple[TrialRow, float, float]], best: TrialRow | None, keys: Sequence[str] | None
) -> list[str]:
    """Return a mark for each trial. Of many, only the best has a text of its own: a page of a thousand trials
    stays small."""
    if len(places) <= MOST_TEXTS:
        return [
            mark(px, py, kind_of(row, best), describe(row, row.perplexity, keys)) for row, px, py in places
        ]
    paths: dict[str, list[str]] = {}
    for row, px, py in places:
        if row is not best:
            kind = kind_of(row, best)
            paths.setdefault(kind, []).append(f"M{px:.0f} {py:.0f}{SMALL.get(kind, SMALL['complete'])}")
    found = [f'<path class="mark {kind}" d="{"".join(each)}"/>' for kind, each in paths.items()]
    return found + [
        mark(px, py, "best", describe(row, row.perplexity, keys)) for row, px, py in places if row is best
    ]


def _star(radius: float) -> str:
    corners = [
        (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
        for i, r in enumerate([radius, radius * 0.45] * 5)
    ]
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in corners) + "Z"


def _step(rough: float) -> float:
    scale = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(scale * step for step in STEPS if scale * step >= rough * (1 - 1e-9)) if rough > 0 else 1.0
