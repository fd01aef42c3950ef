"""runs/<study>/report.html: one file that opens without network. Reads the study; imports no torch."""

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from lora_search.files.atomic import write_file
from lora_search.page.charts import kind_of, learning_curves, parameter_chart
from lora_search.page.diagrams import importance_chart, length_chart, parallel, timeline
from lora_search.results.confirmation_text import HEADS, confirmed_cells, verdicts
from lora_search.results.costs import costs
from lora_search.results.findings import facts, hints, how_sure, share_saved, tiles
from lora_search.results.formatting import (
    short_names,
    show_change,
    show_count,
    show_difference,
    show_perplexity,
    show_seconds,
    show_value,
)
from lora_search.results.importance import importances
from lora_search.results.ranking import ranked, searched_keys
from lora_search.results.record import StudyRecord
from lora_search.results.samples import read_samples
from lora_search.results.timeline import lanes_of
from lora_search.results.verdict import metric_base, metric_name, metric_text, split_keys, state_of
from lora_search.study.provenance import LENGTHS

KINDS = ("best", "complete", "pruned", "failed", "running", "waiting")
MOST_COLUMNS = 5  # of settings beside the results, at 1,280 pixels; more become rows of a table of their own
MOST_ROWS = 200  # of the leaderboard, and of what was stopped: nobody reads a page of a thousand trials


def write_report(record: StudyRecord) -> Path:
    """Write the report of a study to its folder, replacing an older one in one go; return the file. Hostile
    text in it stays text. Raises WriteError."""
    rows, attributes, best, listed = record.rows, record.attributes, record.best, ranked(record.rows)
    stopped = [row for row in listed if row.state in ("PRUNED", "FAIL")]
    page = template().render(
        study=record,
        facts=facts(attributes),
        rows=listed[:MOST_ROWS],
        rows_left=len(listed[MOST_ROWS:]),
        tiles=tiles(rows),
        costs=costs(record),
        samples=read_samples(record.folder, best),
        stopped=stopped[:MOST_ROWS],
        stopped_left=len(stopped[MOST_ROWS:]),
        recovered=[row for row in listed if row.recovery],
        saved=share_saved(rows),
        legend=[kind for kind in KINDS if kind in {kind_of(row, best) for row in rows}],
        sure=how_sure(record),
        metric=metric_name(rows),
        metric_base="".join(metric_base(rows)),
        confirmed_heads=HEADS,
        confirmed=confirmed_cells(record.confirmation, rows),
        verdicts=verdicts(record.confirmation, rows),
        hints=hints(record),
        **pictures(record),
    )
    path = record.folder / "report.html"
    write_file(path, page.encode())
    return path


def pictures(record: StudyRecord) -> dict[str, object]:
    """Return the charts by their names on the page; empty ones if there is nothing to draw."""
    rows, attributes, best, base = record.rows, record.attributes, record.best, record.base
    keys, mattered, lanes = searched_keys(rows), importances(rows), lanes_of(rows, attributes)
    varying, same = split_keys(rows)
    columns = varying if len(varying) <= MOST_COLUMNS else []
    epoch_rungs = attributes.get("setting/sweep.train.evals_per_epoch", "")
    return {
        "keys": columns,
        "heads": short_names(columns),
        "below": [] if columns else varying,
        "same": same,
        "curves": learning_curves(rows, best, base, int(epoch_rungs) if epoch_rungs.isdigit() else None),
        "charts": [parameter_chart(rows, best, base, key) for key in keys],
        "mattered": mattered,
        "importance": importance_chart(mattered),
        "parallel": parallel(ranked(rows), best, varying, base),
        "lanes": lanes,
        "timeline": timeline(lanes, best) if lanes else "",
        "lengths": length_chart(json.loads(attributes.get(LENGTHS, "{}"))),
    }


def breakable(name: str) -> Markup:
    """Return the name of a setting, which a narrow column breaks between its words."""
    return Markup(escape(name).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>")))


def template() -> Template:
    """Return the page, with everything escaped that is not marked as safe."""
    environment = Environment(
        loader=PackageLoader("lora_search", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"value": show_value, "perplexity": show_perplexity, "duration": show_seconds}
    environment.filters |= {"count": show_count, "breakable": breakable}
    environment.globals |= {"change": show_change, "difference": show_difference, "state_of": state_of}
    environment.globals |= {"metric_text": metric_text}
    return environment.get_template("page.html.j2")
