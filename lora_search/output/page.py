"""runs/<study>/report.html: one file that opens without network. Reads the study; imports no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from plotly.offline import get_plotlyjs

from lora_search.files.atomic import write_file
from lora_search.output.charts import learning_curves, parameter_chart
from lora_search.output.formatting import (
    short_names,
    show_change,
    show_count,
    show_perplexity,
    show_seconds,
    show_value,
)
from lora_search.output.ranking import best_of, is_final, ranked, searched_keys
from lora_search.trial import TrialRow

HIDDEN = ("fingerprint", "command")  # the settings say the same; shown above


def write_report(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], base_perplexity: float, path: Path
) -> None:
    """Write the report of a study, replacing an older one in one go. Hostile text in it stays text.
    Raises WriteError."""
    best, keys = best_of(rows), searched_keys(rows)
    epoch_rungs = attributes.get("setting/sweep.train.evals_per_epoch", "")
    page = template().render(
        name=attributes.get("study", path.parent.name),
        attributes=attributes,
        facts=facts(attributes),
        base=base_perplexity,
        best=best,
        is_final=is_final(rows, attributes),
        rows=ranked(rows),
        keys=keys,
        heads=short_names(keys),
        tiles=tiles(rows),
        stopped=[row for row in ranked(rows) if row.state in ("PRUNED", "FAIL")],
        saved=share_saved(rows),
        plotly_js=get_plotlyjs(),
        curves=learning_curves(
            rows, best, base_perplexity, int(epoch_rungs) if epoch_rungs.isdigit() else None
        ),
        charts=[parameter_chart(rows, best, base_perplexity, key) for key in keys],
    )
    write_file(path, page.encode())


def template() -> Template:
    """Return the page, with everything escaped that is not marked as safe."""
    environment = Environment(
        loader=PackageLoader("lora_search", "output"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"value": show_value, "perplexity": show_perplexity, "duration": show_seconds}
    environment.filters |= {"count": show_count}
    environment.globals |= {"change": show_change}
    return environment.get_template("page.html.j2")


def tiles(rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    """Return the figures of the headline, and what each one is."""
    states = [row.state for row in rows]
    shown = [
        ("trials complete", str(states.count("COMPLETE"))),
        ("pruned", str(states.count("PRUNED"))),
        ("failed", str(states.count("FAIL"))),
        ("tokens trained", show_count(sum(row.train_tokens for row in rows))),
        ("training time", show_seconds(sum(row.train_seconds for row in rows))),
    ]
    running = states.count("RUNNING") + states.count("WAITING")
    return [*shown, ("still to end", str(running))] if running else shown


def share_saved(rows: Sequence[TrialRow]) -> tuple[int, int] | None:
    """Return (rungs trained by the pruned trials, rungs had they all run as long as the longest trial)."""
    pruned = [len(row.perplexities) for row in rows if row.state == "PRUNED"]
    longest = max((len(row.perplexities) for row in rows if row.state == "COMPLETE"), default=0)
    return (sum(pruned), longest * len(pruned)) if pruned and longest else None


def facts(attributes: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return what the study knows about itself, in groups: title -> name -> value."""
    groups: dict[str, dict[str, str]] = {"Run": {}, "Data": {}, "Versions": {}, "Settings": {}}
    prefixes = {"version/": "Versions", "setting/sweep.": "Settings", "data.": "Data", "data/": "Data"}
    for key, value in sorted(attributes.items()):
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if key not in HIDDEN:
            groups[prefixes[prefix] if prefix else "Run"][key.removeprefix(prefix or "")] = value
    return {title: group for title, group in groups.items() if group}
