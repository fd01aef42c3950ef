"""The report's other pictures: when each slot was busy, all settings of a trial at once, what mattered, and
how long the rows are. SVG as in charts. Pure."""

from collections.abc import Mapping, Sequence
from html import escape

from lora_search.page.charts import (
    NARROW,
    WIDE,
    Axis,
    describe,
    is_finite,
    kind_of,
    mark,
    setting_axis,
    svg,
    value_axis,
)
from lora_search.results.formatting import short_names, show_seconds, show_value
from lora_search.results.importance import Importance
from lora_search.results.timeline import Bar, Lanes
from lora_search.trial import TrialRow

LANE, ROW = 18, 26  # pixels of height
ABSENT = "not set"  # a setting that a trial does not have
MOST_LANES, MOST_LINES, MOST_TITLES = 64, 120, 150
STEPS = (5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400)  # seconds between ticks


def timeline(lanes: Lanes, best: TrialRow | None) -> str:
    """Return which slot trained which trial when; gaps are idle time, dashed lines later starts, or between
    workers."""
    shown, left, foot = lanes.lanes[:MOST_LANES], 40, 34
    bottom = LANE * len(shown)
    x = Axis(0.0, lanes.seconds or 1.0, left, WIDE - 14)
    step = next((s for s in STEPS if lanes.seconds / s <= 10), 86400 * (1 + int(lanes.seconds / 864000)))
    parts = [upright(x.at(t), 0, bottom) for t in range(0, int(lanes.seconds) + 1, step)]
    parts += [text_at(x.at(t), bottom + 16, show_seconds(t)) for t in range(0, int(lanes.seconds) + 1, step)]
    parts += [upright(t_px, 0, bottom, "line base") for t_px in map(x.at, lanes.breaks)]
    parts += [text_at(left - 8, LANE * i + 13, str(i + 1), "end") for i in range(len(shown))]
    parts += [f'<path class="line base" d="M0 {LANE * i}H{WIDE}"/>' for i in lanes.bounds if i < len(shown)]
    has_titles = sum(map(len, shown)) <= MOST_TITLES
    for i, lane in enumerate(shown):
        for bar in lane:
            parts += _bar(bar, x, LANE * i, best, has_title=has_titles)
    label = f"{len(shown)} slots over {show_seconds(lanes.seconds)} of work: which trial trained when"
    return svg(WIDE, bottom + foot, label, [*parts, text_at(WIDE / 2, bottom + foot - 2, "time at work")])


def _bar(bar: Bar, x: Axis, top: float, best: TrialRow | None, *, has_title: bool) -> list[str]:
    begin, end = x.at(bar.begin), x.at(bar.end)
    name = f"trial {bar.row.number}, {bar.row.state.lower()}, {show_seconds(bar.end - bar.begin)}"
    width = max(1.0, end - begin - 1)
    parts = [block(begin, top + 2, width, LANE - 4, kind_of(bar.row, best), name if has_title else "")]
    if width > 26:
        parts.append(text_at(begin + 4, top + 13, str(bar.row.number), "start", "on"))
    return parts


def parallel(rows: Sequence[TrialRow], best: TrialRow | None, keys: Sequence[str], base: float) -> str:
    """Return a line for each of the best trials, through the values of its settings to its perplexity."""
    shown = [row for row in rows if is_finite(row.perplexity)][:MOST_LINES]
    if len(shown) < 2 or not keys:
        return ""
    height, left, right = 320, 70, WIDE - 70
    places = [left + (right - left) * i / len(keys) for i in range(len(keys) + 1)]
    axes = [_setting_axis([row.params.get(key, ABSENT) for row in shown], height - 30) for key in keys]
    y = value_axis([row.perplexity for row in shown if row.perplexity], base, height + 14)
    ticks = [axis[1] for axis in axes] + [[(y.at(v), name) for v, name in y.ticks()]]
    parts: list[str] = []
    names = [*short_names(keys), "perplexity"]
    is_crowded = sum(map(len, names)) > 100
    for i, (place, name, marks) in enumerate(zip(places, names, ticks, strict=True)):
        foot = height - 8 + (15 * (i % 3) if is_crowded else 0)
        parts += [upright(place, 14, height - 30), text_at(place, foot, name, kind="name")]
        beside = (place + 8, "start") if place == places[-1] else (place - 6, "end")
        parts += [text_at(beside[0], at + 4, text, beside[1]) for at, text in marks]
    worst_first = [*(row for row in shown[::-1] if row is not best), *(row for row in shown if row is best)]
    for row in worst_first:
        heights = [
            axis[0][show_value(row.params.get(key, ABSENT))] for key, axis in zip(keys, axes, strict=True)
        ]
        points = zip(places, [*heights, y.at(row.perplexity or base)], strict=True)
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        title = f"<title>{escape(describe(row, row.perplexity))}</title>"
        parts.append(f'<path class="line {kind_of(row, best)}" d="M{path}">{title}</path>')
    label = f"Settings and perplexity of the {len(shown)} best trials, a line for each"
    return svg(WIDE, height + (30 if is_crowded else 0), label, parts)


def _setting_axis(
    values: Sequence[object], height: float
) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """Return where each value is drawn, and what is written at the axis."""
    present = [value for value in values if value != ABSENT]
    absent = {ABSENT: height} if len(present) < len(values) else {}
    axis, places = setting_axis(present, height - 24 if absent else height, 14.0)
    found = {show_value(value): axis.at(place) for value, place in zip(present, places, strict=True)}
    marks = [(axis.at(value), name) for value, name in axis.ticks()] if present else []
    return found | absent, [*((at, name) for name, at in absent.items()), *marks]


def importance_chart(found: Sequence[Importance]) -> str:
    """Return a dot with its 95 % interval for each setting; hollow where chance would do as well."""
    left, right, bottom = 260, WIDE - 60, ROW * len(found) + 6
    x = Axis(0.0, 1.0, left, right)
    parts = [upright(x.at(v / 4), 6, bottom) for v in range(5)]
    parts += [text_at(x.at(v / 4), bottom + 16, f"{25 * v} %") for v in range(5)]
    for i, one in enumerate(found):
        middle, kind = ROW * i + 20, "complete" if one.is_sure else "running"
        parts.append(text_at(left - 14, middle + 4, one.key, "end", "name"))
        parts.append(f'<path class="line {kind}" d="M{x.at(one.low):.1f} {middle}H{x.at(one.high):.1f}"/>')
        parts.append(mark(x.at(one.share), middle, kind, f"{in_words(one)}, p {one.p_value:.2g}", 6.0))
    label = f"Share of the ranking that each setting explains alone: {'; '.join(map(in_words, found))}"
    foot = text_at((left + right) / 2, bottom + 32, "share of the ranking explained")
    return svg(WIDE, bottom + 34, label, [*parts, foot])


def in_words(one: Importance) -> str:
    """Return an importance as text for screen readers."""
    return f"{one.key} {one.share:.0%}, 95 % interval {one.low:.0%} to {one.high:.0%}"


def length_chart(histogram: Mapping[str, object]) -> str:
    """Return how many training rows have how many tokens."""
    counts, width = histogram.get("counts"), histogram.get("width")
    if not isinstance(counts, list) or not isinstance(width, int) or not counts:
        return ""
    left, top, bottom, end = 50, 8.0, 136, NARROW - 14
    x, y = Axis(0.0, len(counts) * width, left, end), Axis(0.0, max(counts) * 1.08, bottom, top)
    whole = [(y.at(v), name) for v, name in y.ticks() if v == int(v)]
    parts = [f'<path class="grid" d="M{left} {at:.1f}H{end}"/>' for at, _ in whole]
    parts += [text_at(left - 6, at + 4, name, "end") for at, name in whole]
    for i, count in enumerate(counts):
        begin, height = x.at(i * width), y.at(0) - y.at(count)
        name = f"{count} rows of {i * width + 1} to {(i + 1) * width} tokens"
        parts.append(block(begin, y.at(count), x.at((i + 1) * width) - begin - 1, height, "complete", name))
    parts += [text_at(x.at(v), bottom + 16, name) for v, name in x.ticks()]
    parts.append(text_at(NARROW / 2, bottom + 38, "tokens of a training row, as trained"))
    label = f"Lengths of {sum(counts)} training rows in tokens, at most {len(counts) * width}"
    return svg(NARROW, bottom + 44, label, parts)


def upright(x: float, top: float, bottom: float, kind: str = "grid") -> str:
    return f'<path class="{kind}" d="M{x:.1f} {top}V{bottom}"/>'


def text_at(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def block(x: float, y: float, width: float, height: float, kind: str, name: str) -> str:
    """Return a rectangle, with its text for pointer and screen reader."""
    title = f"<title>{escape(name)}</title>" if name else ""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="bar {kind}" {place}>{title}</rect>'
