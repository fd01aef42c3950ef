"""Mean regret over the training tokens as SVG: a panel for each family, bands of a standard error. Pure."""

from collections.abc import Mapping, Sequence

import numpy as np

from lora_search.page.charts import Axis, svg
from tests.benchmarks.contenders import FREEZE_THAW, OURS

LINES = {  # Okabe and Ito's colours
    OURS: "#0072b2", FREEZE_THAW: "#d55e00", "random": "#999999", "tpe": "#000000",
    "tpe, hyperband": "#e69f00", "tpe, successive halving": "#56b4e9", "grid 3x3x2": "#cc79a7",
    "Syne Tune's ASHA": "#009e73", "SMAC3's Hyperband": "#b5a900",
}  # fmt: skip
WIDE, HIGH, ACROSS = 400, 260, 2
STYLE = (
    "text{font:11px sans-serif;fill:#222}.grid{stroke:#ddd;fill:none}.line{fill:none;stroke-width:1.8}"
    ".title{font-weight:bold}"
)


def plot(found: Mapping[str, Mapping[str, np.ndarray]], budgets: Sequence[int]) -> str:
    """Return the picture."""
    parts = [f"<style>{STYLE}</style>", '<rect width="100%" height="100%" fill="#fff"/>']
    for i, (family, regrets) in enumerate(found.items()):
        place = f"translate({i % ACROSS * WIDE} {i // ACROSS * HIGH})"
        parts.append(f'<g transform="{place}">{"".join(_panel(family, regrets, budgets))}</g>')
    foot = -(-len(found) // ACROSS) * HIGH
    shown = [name for name in LINES if any(name in regrets for regrets in found.values())]
    for i, name in enumerate(shown):
        x, y = 20 + i % 4 * 195, foot + 14 + i // 4 * 18
        parts.append(f'<path class="line" stroke="{LINES[name]}" d="M{x} {y - 4}h22"/>')
        parts.append(f'<text x="{x + 28}" y="{y}">{name}</text>')
    legend = 8 + 18 * -(-len(shown) // 4)
    text = svg(WIDE * min(ACROSS, len(found)), foot + legend, "Mean regret over training tokens", parts)
    return text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _panel(family: str, regrets: Mapping[str, np.ndarray], budgets: Sequence[int]) -> list[str]:
    shown = {name: 100 * regrets[name] for name in LINES if name in regrets}
    means = np.concatenate([one.mean(axis=0) for one in shown.values()])
    x = Axis(budgets[0], budgets[-1], 48, WIDE - 12)
    y = Axis(max(0.1, 0.8 * means.min()), 1.2 * means.max(), HIGH - 40, 26, is_log=True)
    parts = [f'<text class="title" x="48" y="16">{family}</text>']
    parts += [f'<path class="grid" d="M48 {y.at(v):.1f}H{WIDE - 12}"/><text x="42" y="{y.at(v) + 4:.1f}" '
              f'text-anchor="end">{name} %</text>' for v, name in y.ticks()]  # fmt: skip
    parts += [
        f'<text x="{x.at(v):.1f}" y="{HIGH - 24}" text-anchor="middle">{v}</text>' for v in budgets[2::3]
    ]
    parts.append(f'<text x="{WIDE / 2}" y="{HIGH - 8}" text-anchor="middle">tokens, in full trials</text>')
    for name, one in shown.items():
        mean, error = one.mean(axis=0), one.std(axis=0, ddof=1) / np.sqrt(len(one))
        low, high = (np.clip(mean + sign * error, y.low, y.high) for sign in (-1, 1))
        band = [*_points(x, y, budgets, high), *_points(x, y, budgets, low)[::-1]]
        parts.append(f'<path d="M{"L".join(band)}Z" fill="{LINES[name]}" opacity="0.12"/>')
        parts.append(
            f'<path class="line" stroke="{LINES[name]}" d="M{"L".join(_points(x, y, budgets, mean))}"/>'
        )
    return parts


def _points(x: Axis, y: Axis, budgets: Sequence[int], values: np.ndarray) -> list[str]:
    return [f"{x.at(b):.1f} {y.at(float(v)):.1f}" for b, v in zip(budgets, values, strict=True)]
