"""The report's charts. Colours are Okabe and Ito's, safe for colour-blind readers; shapes say the same again.

Backgrounds are clear and greys are middling, so that the charts stand on light and dark pages.
"""

import json
import math
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from lora_search.output.formatting import show_perplexity, show_value
from lora_search.trial import TrialRow

INK, GRID = "#7d8794", "rgba(128,128,128,0.18)"
# What a row is shown as: name in the legend, colour, marker at the end, opacity, line width.
LOOKS = {
    "BEST": ("best", "#009E73", "star", 1.0, 3.5),
    "COMPLETE": ("complete", "#0072B2", "circle", 0.85, 1.8),
    "RUNNING": ("running", "#56B4E9", "circle-open", 0.85, 1.8),
    "WAITING": ("waiting", "#E69F00", "square-open", 0.85, 1.8),
    "PRUNED": ("pruned", "#D55E00", "x", 0.4, 1.4),
    "FAIL": ("failed", "#CC79A7", "diamond", 0.4, 1.4),
}
MAX_CATEGORIES = 6  # a number with at most so many values is drawn as choices
LOG_RATIO = 5.0  # values that spread further than this get a log axis


def learning_curves(
    rows: Sequence[TrialRow], best: TrialRow | None, base_perplexity: float, evals_per_epoch: int | None
) -> str:
    """Return the perplexity of every trial over the data it has seen, from the untrained base model on."""
    figure = go.Figure()
    named: set[str] = set()
    for row in sorted(rows, key=lambda r: (r is best, r.state == "COMPLETE")):  # the best is drawn on top
        if not row.perplexities:
            continue
        name, colour, marker, opacity, width = look_of(row, best)
        rungs = [0, *row.perplexities]
        figure.add_scatter(
            x=[rung / (evals_per_epoch or 1) for rung in rungs],
            y=[base_perplexity, *row.perplexities.values()],
            name=name,
            legendgroup=name,
            showlegend=name not in named,
            mode="lines+markers",
            opacity=opacity,
            line={"color": colour, "width": width},
            marker={
                "color": colour,
                "symbol": marker,
                "size": [0] * (len(rungs) - 1) + [15 if row is best else 11],
            },
            hovertemplate=f"<b>%{{y:.3f}}</b> after %{{x}}<br>{describe(row)}<extra></extra>",
        )
        named.add(name)
    figure.add_hline(y=base_perplexity, line_dash="dash", line_color=INK, line_width=1)
    figure.add_annotation(
        text=f"base model {show_perplexity(base_perplexity)}",
        x=1,
        xref="paper",
        xanchor="right",
        y=math.log10(base_perplexity) if is_log(rows, base_perplexity) else base_perplexity,
        yanchor="bottom",
        showarrow=False,
        font_color=INK,
    )
    title = "epochs of examples seen" if evals_per_epoch else "rung"
    figure.update_xaxes(title_text=title, rangemode="tozero")
    figure.update_yaxes(title_text="validation perplexity", **y_axis(rows, base_perplexity))
    return finish(figure, height=440, has_legend=True)


def parameter_chart(rows: Sequence[TrialRow], best: TrialRow | None, base_perplexity: float, key: str) -> str:
    """Return best perplexity against one searched setting; hollow trials did not run to their end."""
    measured = [row for row in rows if row.perplexity is not None and key in row.params]
    values = [row.params[key] for row in measured]
    numbers = [value for value in values if isinstance(value, int | float)]
    is_number = len(numbers) == len(values) and len(set(numbers)) > MAX_CATEGORIES
    figure = go.Figure()
    for name, colour, marker, _, _ in LOOKS.values():
        picked = [i for i, row in enumerate(measured) if look_of(row, best)[0] == name]
        figure.add_scatter(
            x=[values[i] if is_number else escape(show_value(values[i])) for i in picked],
            y=[measured[i].perplexity for i in picked],
            mode="markers",
            marker={"color": colour, "symbol": marker, "size": 15 if name == "best" else 10},
            opacity=1.0 if name in ("best", "complete") else 0.6,
            hovertemplate=[f"<b>%{{y:.3f}}</b><br>{describe(measured[i])}<extra></extra>" for i in picked],
        )
    figure.add_hline(y=base_perplexity, line_dash="dash", line_color=INK, line_width=1)
    figure.update_yaxes(**y_axis(rows, base_perplexity))
    if is_number:
        spread = max(numbers) / min(numbers) if min(numbers) > 0 else 0.0
        figure.update_xaxes(type="log" if spread > LOG_RATIO else "linear", exponentformat="power", nticks=6)
        if spread > LOG_RATIO:
            figure.update_xaxes(dtick=1 if spread > 30 else "D2")
    else:
        order = [escape(show_value(value)) for value in sorted(values, key=choice_order)]
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(dict.fromkeys(order)))
    figure.update_xaxes(title_text=escape(key))
    return finish(figure, height=280, has_legend=False)


def look_of(row: TrialRow, best: TrialRow | None) -> tuple[str, str, str, float, float]:
    return LOOKS["BEST" if row is best else row.state]


def describe(row: TrialRow) -> str:
    """Return a trial's hover text, with nothing in it that a browser could run."""
    params = "<br>".join(f"{escape(key)} {escape(show_value(value))}" for key, value in row.params.items())
    return f"trial {row.number}, {row.state.lower()}<br>{params}".replace("%{", "% {")


def choice_order(value: object) -> tuple[int, float, str]:
    """Sort numbers by size, before texts."""
    return (
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, json.dumps(value, default=str))
    )


def is_log(rows: Sequence[TrialRow], base_perplexity: float) -> bool:
    values = [*(value for row in rows for value in row.perplexities.values()), base_perplexity]
    finite = [value for value in values if math.isfinite(value) and value > 0]
    return bool(finite) and max(finite) / min(finite) > LOG_RATIO


def y_axis(rows: Sequence[TrialRow], base_perplexity: float) -> dict[str, object]:
    """Return the axis that all charts share: far outliers turn it into a log axis."""
    if is_log(rows, base_perplexity):
        return {"type": "log", "dtick": "D2"}
    return {"type": "linear"}


def finish(figure: go.Figure, *, height: int, has_legend: bool) -> str:
    """Return the chart as HTML that needs plotly.js on the page."""
    figure.update_xaxes(
        gridcolor=GRID, zeroline=False, linecolor=GRID, tickfont_color=INK, title_font_color=INK
    )
    figure.update_yaxes(
        gridcolor=GRID, zeroline=False, linecolor=GRID, tickfont_color=INK, title_font_color=INK
    )
    figure.update_layout(
        height=height,
        margin={"l": 56, "r": 12, "t": 12, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        showlegend=has_legend,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
    )
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return html
