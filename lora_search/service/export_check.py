"""At the end of a sweep: for one row, plain PEFT on the loaded base gives what the study measured. Imports
torch."""

import math
from pathlib import Path

from lora_search.data.store import lengths_of
from lora_search.engine.engine import Engine
from lora_search.engine.evaluation import ROUNDING
from lora_search.errors import StudyError
from lora_search.files.peft import load_adapters
from lora_search.files.row_scores import read_scores
from lora_search.results.ranking import best_of
from lora_search.service.plain import plain_perplexity
from lora_search.service.scoring import adapter_of
from lora_search.settings.schema import StudyConfig
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow


def check_best_export(engine: Engine, config: StudyConfig, folder: Path) -> list[str]:
    """Return what `check_export` says of the best trial; nothing without one or its adapter."""
    best = best_of(StudyView(config).rows())
    if best is None or not adapter_of(best, folder).is_dir():
        return []
    return check_export(engine, best, folder)


def check_export(engine: Engine, row: TrialRow, folder: Path) -> list[str]:
    """Return a line with both perplexities of the shortest validation row, none if the study has none. Raises
    StudyError if they differ by more than rounding. The engine cannot be used afterwards."""
    adapter = adapter_of(row, folder)
    kept = read_scores(adapter.parent)
    if kept is None or len(kept[0].tokens_R) != len(engine.splits.validation):
        return []
    scores, number = kept[0], int(lengths_of(engine.splits.validation).argmin())
    expected = math.exp(scores.nll_R[number] / scores.tokens_R[number])
    base = engine.model.language_model
    engine.bank.remove(base)
    base.set_attn_implementation("eager")
    found = plain_perplexity(load_adapters(base, {"best": adapter}), [engine.splits.validation[number]])
    said = f"{found:.6g} in plain PEFT, {expected:.6g} in the study"
    if not abs(found / expected - 1) <= ROUNDING[base.dtype]:
        raise StudyError(
            f"trial {row.number}: the adapter in {adapter} gives validation row {number} a perplexity of "
            f"{said}. Do not use it before that is explained, and please report it with the model's name."
        )
    return [f"trial {row.number} as exported: perplexity of validation row {number} {said}"]
