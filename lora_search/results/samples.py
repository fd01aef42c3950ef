"""Sample answers of base and best trial to the same validation questions: runs/<study>/samples.json."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_search.files.atomic import write_file
from lora_search.trial import TrialRow

FILE = "samples.json"


@dataclass(frozen=True)
class Sample:
    """One question with the answer in the data and the greedy answers of base and trial."""

    question: str
    reference: str
    base: str
    best: str


def write_samples(folder: Path, trial: TrialRow, max_tokens: int, samples: Sequence[Sample]) -> None:
    """Write the answers to the study's folder. Raises WriteError."""
    of_trial = {"trial": trial.number, "rung": trial.best_rung, "max_tokens": max_tokens}
    kept = {**of_trial, "samples": [asdict(sample) for sample in samples]}
    write_file(folder / FILE, json.dumps(kept, indent=1, ensure_ascii=False).encode())


def read_samples(folder: Path, trial: TrialRow | None) -> list[Sample]:
    """Return the answers of this trial at its best rung; empty if the file is missing or another trial's."""
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        is_its = trial is not None and (kept["trial"], kept["rung"]) == (trial.number, trial.best_rung)
        return [Sample(**sample) for sample in kept["samples"]] if is_its else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
