"""runs/<study>/report.html: one file that opens without network. Reads the study; imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lora_search.files.atomic import write_file
from lora_search.page.charts import kind_of, learning_curves, parameter_chart
from lora_search.results.certainty import SURE, Certainty, certainty_of
from lora_search.results.confirmed import HEADS, confirmed_cells, verdicts
from lora_search.results.formatting import (
    short_names,
    show_change,
    show_count,
    show_difference,
    show_perplexity,
    show_seconds,
    show_value,
)
from lora_search.results.ranking import best_of, is_final, ranked, searched_keys
from lora_search.results.verdict import line_of_test, state_of, tied_line
from lora_search.study.confirmation import read_confirmation
from lora_search.study.results import read_test_score
from lora_search.trial import TrialRow

KINDS = ("best", "complete", "pruned", "failed", "running", "waiting")
HIDDEN = (
    "fingerprint",
    "command",
    "settings",
    "test_score",
    "confirmation",
)  # the settings say the same; shown above


def write_report(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], base_perplexity: float, path: Path
) -> None:
    """Write the report of a study, replacing an older one in one go. Hostile text in it stays text.
    Raises WriteError."""
    best, keys = best_of(rows), searched_keys(rows)
    certainty = certainty_of(rows, path.parent)
    confirmation = read_confirmation(attributes)
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
        legend=[kind for kind in KINDS if kind in {kind_of(row, best) for row in rows}],
        sure=how_sure(rows, attributes, certainty, best),
        certainty=certainty,
        places=certainty.decimals(best.perplexity) if best and best.perplexity else None,
        confirmed_heads=HEADS,
        confirmed=confirmed_cells(confirmation, rows),
        verdicts=verdicts(confirmation, rows),
        hints=hints(rows, best),
        curves=learning_curves(
            rows, best, base_perplexity, int(epoch_rungs) if epoch_rungs.isdigit() else None
        ),
        charts=[parameter_chart(rows, best, base_perplexity, key) for key in keys],
    )
    write_file(path, page.encode())


def template() -> Template:
    """Return the page, with everything escaped that is not marked as safe."""
    environment = Environment(
        loader=PackageLoader("lora_search", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"value": show_value, "perplexity": show_perplexity, "duration": show_seconds}
    environment.filters |= {"count": show_count}
    environment.globals |= {"change": show_change, "difference": show_difference, "state_of": state_of}
    return environment.get_template("page.html.j2")


def report_facts(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], base_perplexity: float, folder: Path
) -> dict[str, object]:
    """Return what the report says, for programs: numbers unrounded; what is not finite is None."""
    best, certainty = best_of(rows), certainty_of(rows, folder)

    def of_trial(row: TrialRow) -> dict[str, object]:
        to_best, to_base = certainty.against_best.get(row.number), certainty.against_base.get(row.number)
        return {
            **{key: value for key, value in asdict(row).items() if key != "perplexities"},
            "perplexities": {rung: finite(value) for rung, value in row.perplexities.items()},
            "is_best": row is best,
            "is_tied": certainty.is_tied(row),
            "against_best": asdict(to_best) | {"rows_needed": to_best.rows_needed} if to_best else None,
            "against_base": asdict(to_base) if to_base else None,
        }

    test, confirmation = read_test_score(attributes), read_confirmation(attributes)
    return {
        "study": attributes.get("study", folder.name),
        "base_perplexity": finite(base_perplexity),
        "best": best.number if best else None,
        "is_final": is_final(rows, attributes),
        "how_sure": how_sure(rows, attributes, certainty, best),
        "test_score": asdict(test) if test else None,
        "confirmation": asdict(confirmation) | {"verdicts": verdicts(confirmation, rows)},
        "hints": hints(rows, best),
        "trials": [of_trial(row) for row in ranked(rows)],
        "facts": facts(attributes),
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def report_markdown(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], base_perplexity: float, folder: Path
) -> str:
    """Return what the report says as Markdown."""
    best, certainty, keys = best_of(rows), certainty_of(rows, folder), searched_keys(rows)
    places = certainty.decimals(best.perplexity) if best and best.perplexity else None
    table = [["trial", "perplexity", "change", *keys, "rungs", "state"]]
    table.append(["-", show_perplexity(base_perplexity, places), "", *("" for _ in keys), "", "base model"])
    for row in ranked(rows):
        values = [show_value(row.params[key]) if key in row.params else "" for key in keys]
        result = [show_perplexity(row.perplexity, places), show_change(base_perplexity, row.perplexity)]
        ending = [str(len(row.perplexities)), state_of(row, certainty)]
        table.append([str(row.number), *result, *values, *ending])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    sure = [f"- {sentence}" for sentence in how_sure(rows, attributes, certainty, best)]
    further = [f"- {text} `{override}`" for text, override in hints(rows, best)]
    parts = [f"# {attributes.get('study', folder.name)}", "\n".join(sure), "\n".join(lines)]
    if confirmed := verdicts(read_confirmation(attributes), rows):
        parts.append("## Confirmed with fresh seeds\n\n" + "\n".join(f"- {text}" for text in confirmed))
    parts += ["## What may help further\n\n" + "\n".join(further)] if further else []
    return "\n\n".join(parts) + "\n"


def how_sure(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], certainty: Certainty, best: TrialRow | None
) -> list[str]:
    """Return what the rows say for and against the winner, a sentence each."""
    if best is None:
        return []
    said: list[str] = []
    to_base = certainty.against_base.get(best.number)
    if to_base is not None:
        low, high = (100 * (to_base.change + sign * SURE * to_base.change_error) for sign in (-1, 1))
        said.append(
            f"Against the base model on the same {to_base.num_rows} validation rows: "
            f"{show_difference(to_base.change, to_base.change_error)} (95 % interval {low:+.1f} to "
            f"{high:+.1f} %). The trial was chosen on these rows, so this is a little too good."
        )
    test = read_test_score(attributes)
    said.append(f"{line_of_test(test, best)}." if test else "The test split has not been scored.")
    tied = tied_line(rows, certainty)
    if tied:
        said.append(f"{tied[0].upper()}{tied[1:]}.")
    elif certainty.against_best:
        said.append("No other complete trial is within two standard errors of it.")
    else:
        said.append("How the trials compare row by row is not known here, so neither is who is tied.")
    return said


def hints(rows: Sequence[TrialRow], best: TrialRow | None) -> list[tuple[str, str]]:
    """Return what might help further, each with the override to type."""
    if best is None:
        return []
    found = [(f"{key} of the best is the {word} value that was tried.", override)
             for key in best.params for word, override in at_edge(rows, best, key)]  # fmt: skip
    if best.perplexities and best.best_rung == max(best.perplexities):
        text = "The best trial was still improving at its end: more epochs may help."
        found.insert(0, (text, "train.epochs=N"))
    return found


def at_edge(rows: Sequence[TrialRow], best: TrialRow, key: str) -> list[tuple[str, str]]:
    """Return whether the best value is the smallest or largest of those tried, and a wider range to type."""
    values = [v for row in rows if isinstance(v := row.params.get(key), int | float)]
    value, tried = best.params[key], sorted(set(values))
    if not isinstance(value, int | float) or isinstance(value, bool) or len(tried) < 3:
        return []
    low, high = tried[0], tried[-1]
    found = []
    for edge, word, factor in ((low, "smallest", 0.5), (high, "largest", 2.0)):
        if value != edge:
            continue
        if all(isinstance(v, int) for v in tried):
            choices = sorted({*tried, max(1, round(edge * factor))})
            found.append((word, f"'{key}=choice({', '.join(map(str, choices))})'"))
        else:
            ends = (low / 3, high) if word == "smallest" else (low, high * 3)
            found.append((word, f"'{key}=tag(log, interval({show_value(ends[0])}, {show_value(ends[1])}))'"))
    return found


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
