"""The content of the report as JSON and as Markdown. Imports no torch."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lora_search.results.certainty import certainty_of
from lora_search.results.confirmation import read_confirmation
from lora_search.results.confirmation_text import verdicts
from lora_search.results.costs import costs
from lora_search.results.findings import facts, hints, how_sure
from lora_search.results.formatting import show_change, show_perplexity, show_value
from lora_search.results.importance import importances
from lora_search.results.ranking import best_of, is_final, ranked, searched_keys
from lora_search.results.samples import read_samples
from lora_search.results.verdict import metric_base, metric_name, metric_text, state_of
from lora_search.study.stored_results import read_finals, read_test_score
from lora_search.trial import TrialRow


def report_facts(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], base_perplexity: float, folder: Path
) -> dict[str, object]:
    """Return the report's content for programs: unrounded numbers; None for values that are not finite."""
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
        "final_adapters": [asdict(final) for final in read_finals(attributes)],
        "hints": hints(rows, attributes, best),
        "trials": [of_trial(row) for row in ranked(rows)],
        "costs": costs(rows, attributes, folder),
        "importance": [asdict(one) for one in importances(rows)],
        "samples": [asdict(sample) for sample in read_samples(folder, best)],
        "facts": facts(attributes),
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def report_markdown(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], base_perplexity: float, folder: Path
) -> str:
    """Return the report's content as Markdown."""
    best, certainty, keys = best_of(rows), certainty_of(rows, folder), searched_keys(rows)
    places = certainty.decimals(best.perplexity) if best and best.perplexity else None
    metric = [name] if (name := metric_name(rows)) else []
    table = [["trial", "perplexity", "change", *keys, *metric, "rungs", "state"]]
    blanks = ["" for _ in keys]
    base = [show_perplexity(base_perplexity, places), "", *blanks, *metric_base(rows)]
    table.append(["-", *base, "", "base model"])
    for row in ranked(rows):
        values = [show_value(row.params[key]) if key in row.params else "" for key in keys]
        result = [show_perplexity(row.perplexity, places), show_change(base_perplexity, row.perplexity)]
        values += [metric_text(row)] if metric else []
        ending = [str(len(row.perplexities)), state_of(row, certainty)]
        table.append([str(row.number), *result, *values, *ending])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    sure = [f"- {sentence}" for sentence in how_sure(rows, attributes, certainty, best)]
    further = [f"- {text} `{override}`" for text, override in hints(rows, attributes, best)]
    parts = [f"# {attributes.get('study', folder.name)}", "\n".join(sure)]
    parts += _samples(folder, best)
    spent = [f"- {what}: {text}" for what, text in costs(rows, attributes, folder).items()]
    parts += ["## What it cost\n\n" + "\n".join(spent), "## Leaderboard\n\n" + "\n".join(lines)]
    if confirmed := verdicts(read_confirmation(attributes), rows):
        parts.append("## Confirmed with fresh seeds\n\n" + "\n".join(f"- {text}" for text in confirmed))
    mattered = [
        f"- {one.key}: explains {one.share:.0%} of the ranking "
        f"(95 % interval {one.low:.0%} to {one.high:.0%})"
        for one in importances(rows)
    ]
    parts += ["## What mattered\n\n" + "\n".join(mattered)] if mattered else []
    parts += ["## What may help further\n\n" + "\n".join(further)] if further else []
    parts += _stopped(rows)
    command = f"## How to reproduce it\n\n    {attributes.get('command', '')}"
    about = [f"- {key}: {text}" for key, text in facts(attributes).get("Data", {}).items()]
    return "\n\n".join([*parts, "## Data\n\n" + "\n".join(about), command]) + "\n"


def _samples(folder: Path, best: TrialRow | None) -> list[str]:
    """Return the answers of base and best to the same questions, each in a line of its own."""
    found = [
        f"### {_line(sample.question)}\n\n- base model: {_line(sample.base)}\n"
        f"- trial {best.number}: {_line(sample.best)}\n- in the data: {_line(sample.reference)}"
        for sample in read_samples(folder, best)
        if best is not None
    ]
    return ["## Sample answers", *found] if found else []


def _line(text: str) -> str:
    """Return the text in one line, in which no HTML begins."""
    return re.sub("<(?=[A-Za-z/!?])", "&lt;", " ".join(text.split()))


def _stopped(rows: Sequence[TrialRow]) -> list[str]:
    stopped = [row for row in ranked(rows) if row.state in ("PRUNED", "FAIL")]
    said = [f"- trial {row.number}, {row.state.lower()}: {_line(row.reason)}" for row in stopped]
    return ["## What was stopped, and why\n\n" + "\n".join(said)] if said else []
