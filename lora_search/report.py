"""runs/<study>/report.html: one file that opens without network. Reads the study; imports no torch.

`python -m lora_search.report -cn NAME [study.name=...]` writes it anew at any time, also while the sweep
runs.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from lora_search.composition import DEFAULT_SWEEP, compose
from lora_search.errors import LoraSearchError, StudyError
from lora_search.progress import Progress
from lora_search.ranking import ranked
from lora_search.ranking import show_value as format_value
from lora_search.study import SweepStudy
from lora_search.trial import TrialRow

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7a5195",
    "#444444",
)  # Okabe and Ito


def write_report(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], base_perplexity: float, path: Path
) -> None:
    """Write the report of a study; hostile text in it stays text."""
    ordered = ranked(rows)
    best = next((row for row in ordered if row.state == "COMPLETE"), None)
    keys = sorted({key for row in rows for key in row.params})
    environment = Environment(loader=PackageLoader("lora_search", "."), autoescape=True)
    html = environment.get_template("report.html.j2").render(
        title=f"lora_search: {path.parent.name}",
        attributes=dict(sorted(attributes.items())),
        base=base_perplexity,
        best=best,
        rows=ordered,
        keys=keys,
        show=format_value,
        counts=_counts(rows),
        plotly_js=get_plotlyjs(),
        curves=_html(_curves(rows, base_perplexity)),
        scatter=_html(_scatter(rows, keys)) if keys else "",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def _counts(rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    states = [row.state for row in rows]
    minutes = sum(row.train_seconds for row in rows) / 60
    return [
        ("complete", str(states.count("COMPLETE"))),
        ("pruned", str(states.count("PRUNED"))),
        ("failed", str(states.count("FAIL"))),
        ("tokens trained", f"{sum(row.train_tokens for row in rows):,}"),
        ("minutes of training", f"{minutes:.1f}"),
    ]


def _curves(rows: Sequence[TrialRow], base_perplexity: float) -> go.Figure:
    figure = go.Figure()
    for row in rows:
        rungs = [0, *row.perplexities]
        kept = row.state == "COMPLETE"
        figure.add_scatter(
            x=rungs, y=[base_perplexity, *row.perplexities.values()], name=f"trial {row.number}",
            mode="lines+markers", opacity=1.0 if kept else 0.45,
            line={"color": COLOURS[row.number % len(COLOURS)], "dash": "solid" if kept else "dot"},
            marker={"size": [0] + [5] * (len(rungs) - 2) + [10], "symbol": "circle" if kept else "x"},
        )  # fmt: skip
    figure.add_hline(y=base_perplexity, line_dash="dash", line_color="#888", annotation_text="base model")
    figure.update_layout(
        xaxis_title="rung", yaxis_title="validation perplexity", height=440, template="plotly_white"
    )
    return figure


def _scatter(rows: Sequence[TrialRow], keys: Sequence[str]) -> go.Figure:
    figure = make_subplots(rows=1, cols=len(keys), subplot_titles=list(keys), shared_yaxes=True)
    measured = [row for row in rows if row.perplexity is not None]
    for column, key in enumerate(keys, start=1):
        values = [row.params.get(key) for row in measured]
        figure.add_scatter(
            x=values if key == "optim.lr" else [str(value) for value in values],
            y=[row.perplexity for row in measured], mode="markers", showlegend=False,
            text=[f"trial {row.number}, {row.state}" for row in measured],
            marker={"color": [COLOURS[0] if row.state == "COMPLETE" else "#b5bcc6" for row in measured],
            "size": 10}, row=1, col=column,
        )  # fmt: skip
        figure.update_xaxes(type="log" if key == "optim.lr" else "category", row=1, col=column)
    figure.update_layout(height=340, template="plotly_white")
    figure.update_yaxes(title_text="best perplexity", row=1, col=1)
    return figure


def _html(figure: go.Figure) -> str:
    text: str = figure.to_html(full_html=False, include_plotlyjs=False)
    return text


def main() -> int:
    progress = Progress()
    arguments = sys.argv[1:]
    name = arguments.pop(arguments.index("-cn") + 1) if "-cn" in arguments[:-1] else DEFAULT_SWEEP
    try:
        config = compose(name, [a for a in arguments if a != "-cn"])
        rows, attributes = SweepStudy.read(config.study)
        if "base_perplexity" not in attributes:
            raise StudyError(
                f"study.name: {config.study.name!r} has measured nothing yet. Run the sweep first."
            )
        path = Path(config.runs_dir) / config.study.name / "report.html"
        write_report(rows, attributes, float(attributes["base_perplexity"]), path)
    except LoraSearchError as error:
        progress.console.print(str(error), markup=False)
        return error.exit_code
    progress.event(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
