"""At the end of a sweep: for a few rows, plain PEFT on the loaded base gives what the study measured. Imports
torch."""

import itertools
import math
from pathlib import Path

import torch

from lora_search.data.store import lengths_of
from lora_search.engine.engine import Engine
from lora_search.engine.evaluation import ROUNDING
from lora_search.errors import StudyError
from lora_search.files.peft import Tuned
from lora_search.files.row_scores import read_scores
from lora_search.results.ranking import best_of
from lora_search.service.plain_peft import plain_perplexity
from lora_search.service.scoring import adapter_of
from lora_search.settings.schema import StudyConfig
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow

ENOUGH_TOKENS, MOST_ROWS = 64, 16  # in 16 bits a row of two learnt tokens may differ by 13 %


def check_best_export(engine: Engine, config: StudyConfig, folder: Path) -> list[str]:
    """Return what `check_export` says of the best trial; nothing without one or its adapter."""
    best = best_of(StudyView(config).rows())
    if best is None or not adapter_of(best, folder).is_dir():
        return []
    return check_export(engine, best, folder)


def check_export(engine: Engine, row: TrialRow, folder: Path) -> list[str]:
    """Return a line with both perplexities of the shortest validation rows, none if the study has none.

    Raises StudyError if they differ by more than rounding; in 16 bits, where that is large, it is a warning.
    The engine cannot be used afterwards.
    """
    adapter = adapter_of(row, folder)
    kept = read_scores(adapter.parent)
    if kept is None or len(kept[0].tokens_R) != len(engine.splits.validation):
        return []
    scores = kept[0]
    by_length = lengths_of(engine.splits.validation).argsort(kind="stable")
    learnt = itertools.accumulate(scores.tokens_R[number] for number in by_length)
    num_rows = 1 + sum(1 for count in itertools.islice(learnt, MOST_ROWS - 1) if count < ENOUGH_TOKENS)
    checked = [int(number) for number in by_length[:num_rows]]
    expected = math.exp(sum(scores.nll_R[n] for n in checked) / sum(scores.tokens_R[n] for n in checked))
    base = engine.model.language_model
    engine.bank.remove(base)
    base.set_attn_implementation("eager")
    with Tuned(base, {"best": adapter}).using("best") as tuned:
        found = plain_perplexity(tuned, [engine.splits.validation[number] for number in checked])
    said = f"{found:.6g} in plain PEFT, {expected:.6g} in the study"
    rows = f"the {len(checked)} shortest validation rows"
    if abs(found / expected - 1) <= ROUNDING[base.dtype]:
        return [f"trial {row.number} as exported: perplexity of {rows} {said}"]
    what = (
        f"trial {row.number}: the adapter in {adapter} gives {rows} a perplexity of {said}. Do not use it "
        "before that is explained, and please report it with the model's name."
    )
    if base.dtype == torch.float32:
        raise StudyError(what)
    return [f"warning: {what}"]
