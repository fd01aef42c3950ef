"""The content of the report as JSON and as Markdown. Imports no torch."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict

from lora_search.results.confirmation_text import verdicts
from lora_search.results.costs import costs
from lora_search.results.findings import facts, hints, how_sure
from lora_search.results.importance import importances
from lora_search.results.ranking import ranked, searched_keys
from lora_search.results.record import StudyRecord
from lora_search.results.samples import read_samples
from lora_search.results.verdict import board
from lora_search.study.stored_results import read_finals
from lora_search.trial import TrialRow


def report_facts(record: StudyRecord) -> dict[str, object]:
    """Return the report's content for programs: unrounded numbers; None for values that are not finite."""
    best, certainty, confirmation = record.best, record.certainty, record.confirmation

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

    return {
        "study": record.name,
        "base_perplexity": finite(record.base),
        "best": best.number if best else None,
        "is_final": record.is_final,
        "how_sure": how_sure(record),
        "test_score": asdict(record.test) if record.test else None,
        "confirmation": asdict(confirmation) | {"verdicts": verdicts(confirmation, record.rows)},
        "final_adapters": [asdict(final) for final in read_finals(record.attributes)],
        "hints": hints(record),
        "trials": [of_trial(row) for row in ranked(record.rows)],
        "costs": costs(record),
        "importance": [asdict(one) for one in importances(record.rows)],
        "samples": [asdict(sample) for sample in read_samples(record.folder, best)],
        "facts": facts(record.attributes),
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def report_markdown(record: StudyRecord) -> str:
    """Return the report's content as Markdown."""
    rows, keys = record.rows, searched_keys(record.rows)
    heads, below = board(record, keys, keys)
    table = [heads, *(cells for _, cells in below)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    sure = [f"- {sentence}" for sentence in how_sure(record)]
    further = [f"- {text} `{override}`" for text, override in hints(record)]
    parts = [f"# {record.name}", "\n".join(sure), *_samples(record)]
    spent = [f"- {what}: {text}" for what, text in costs(record).items()]
    parts += ["## What it cost\n\n" + "\n".join(spent), "## Leaderboard\n\n" + "\n".join(lines)]
    if confirmed := verdicts(record.confirmation, rows):
        parts.append("## Confirmed with fresh seeds\n\n" + "\n".join(f"- {text}" for text in confirmed))
    mattered = [
        f"- {one.key}: explains {one.share:.0%} of the ranking "
        f"(95 % interval {one.low:.0%} to {one.high:.0%})"
        for one in importances(rows)
    ]
    parts += ["## What mattered\n\n" + "\n".join(mattered)] if mattered else []
    parts += ["## What may help further\n\n" + "\n".join(further)] if further else []
    parts += _stopped(rows)
    command = f"## How to reproduce it\n\n    {record.attributes.get('command', '')}"
    about = [f"- {key}: {text}" for key, text in facts(record.attributes).get("Data", {}).items()]
    return "\n\n".join([*parts, "## Data\n\n" + "\n".join(about), command]) + "\n"


def _samples(record: StudyRecord) -> list[str]:
    """Return the answers of base and best to the same questions, each in a line of its own."""
    best = record.best
    found = [
        f"### {_line(sample.question)}\n\n- base model: {_line(sample.base)}\n"
        f"- trial {best.number}: {_line(sample.best)}\n- in the data: {_line(sample.reference)}"
        for sample in read_samples(record.folder, best)
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
