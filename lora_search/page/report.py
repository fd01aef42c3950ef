"""runs/<study>/report.html: one file that opens without network. Reads the study; imports no torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from lora_search.files.atomic import write_file
from lora_search.page.charts import kind_of, learning_curves, parameter_chart
from lora_search.page.diagrams import importance_chart, length_chart, parallel, timeline
from lora_search.results.certainty import certainty_of
from lora_search.results.confirmation import read_confirmation
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
from lora_search.results.ranking import best_of, is_final, ranked, searched_keys
from lora_search.results.samples import read_samples
from lora_search.results.timeline import lanes_of
from lora_search.results.verdict import metric_base, metric_name, metric_text, split_keys, state_of
from lora_search.study.provenance import LENGTHS
from lora_search.trial import TrialRow

KINDS = ("best", "complete", "pruned", "failed", "running", "waiting")
MOST_COLUMNS = 5  # of settings beside the results, at 1,280 pixels; more become rows of a table of their own
MOST_ROWS = 200  # of the leaderboard, and of what was stopped: nobody reads a page of a thousand trials


def write_report(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], base_perplexity: float, path: Path
) -> None:
    """Write the report of a study, replacing an older one in one go. Hostile text in it stays text.
    Raises WriteError."""
    folder, best = path.parent, best_of(rows)
    certainty, listed = certainty_of(rows, folder), ranked(rows)
    confirmation = read_confirmation(attributes)
    stopped = [row for row in listed if row.state in ("PRUNED", "FAIL")]
    page = template().render(
        name=attributes.get("study", folder.name),
        attributes=attributes,
        facts=facts(attributes),
        base=base_perplexity,
        best=best,
        is_final=is_final(rows, attributes),
        rows=listed[:MOST_ROWS],
        rows_left=len(listed[MOST_ROWS:]),
        tiles=tiles(rows),
        costs=costs(rows, attributes, folder),
        samples=read_samples(folder, best),
        stopped=stopped[:MOST_ROWS],
        stopped_left=len(stopped[MOST_ROWS:]),
        recovered=[row for row in listed if row.recovery],
        saved=share_saved(rows),
        legend=[kind for kind in KINDS if kind in {kind_of(row, best) for row in rows}],
        sure=how_sure(rows, attributes, certainty, best),
        certainty=certainty,
        places=certainty.decimals(best.perplexity) if best and best.perplexity else None,
        metric=metric_name(rows),
        metric_base="".join(metric_base(rows)),
        confirmed_heads=HEADS,
        confirmed=confirmed_cells(confirmation, rows),
        verdicts=verdicts(confirmation, rows),
        hints=hints(rows, attributes, best),
        **pictures(rows, attributes, base_perplexity, best),
    )
    write_file(path, page.encode())


def pictures(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], base_perplexity: float, best: TrialRow | None
) -> dict[str, object]:
    """Return the charts by their names on the page; empty ones if there is nothing to draw."""
    keys, mattered, lanes = searched_keys(rows), importances(rows), lanes_of(rows, attributes)
    varying, same = split_keys(rows)
    columns = varying if len(varying) <= MOST_COLUMNS else []
    epoch_rungs = attributes.get("setting/sweep.train.evals_per_epoch", "")
    return {
        "keys": columns,
        "heads": short_names(columns),
        "below": [] if columns else varying,
        "same": same,
        "curves": learning_curves(
            rows, best, base_perplexity, int(epoch_rungs) if epoch_rungs.isdigit() else None
        ),
        "charts": [parameter_chart(rows, best, base_perplexity, key) for key in keys],
        "mattered": mattered,
        "importance": importance_chart(mattered),
        "parallel": parallel(ranked(rows), best, varying, base_perplexity),
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
