"""Sample answers for the report: base and best trial answer the same few validation questions, greedily.

In plain transformers, so the answers are those of a served model. The base is loaded once more. Imports
torch.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_search.data.rows import Pair
from lora_search.errors import LoraSearchError
from lora_search.output.conclusion import one_at_a_time
from lora_search.output.terminal import Progress
from lora_search.results.ranking import best_of
from lora_search.results.samples import Sample, read_samples, write_samples
from lora_search.service.plain import Answerer, open_answerer
from lora_search.settings.schema import SweepConfig
from lora_search.trial import TrialRow

MAX_NEW_TOKENS = 96
LONGEST_PROMPT = 4096  # characters


def keep_samples(
    config: SweepConfig,
    commit: str | None,
    rows: Sequence[TrialRow],
    pairs: Sequence[Pair],
    progress: Progress,
) -> None:
    """Answer the first study.sample_answers questions with base and best trial, and write that to the
    study's folder, unless it exists. A failure is reported and ends nothing."""
    folder, best = Path(config.runs_dir) / config.study.name, best_of(rows)
    chosen = [pair for pair in pairs if len(pair.prompt) <= LONGEST_PROMPT][: config.study.sample_answers]
    if best is None or best.state != "COMPLETE" or not chosen:
        return
    try:
        with one_at_a_time(folder):
            if len(read_samples(folder, best)) >= len(chosen):
                return
            progress.event(f"base and trial {best.number} answer {len(chosen)} validation questions")
            answerer = open_answerer(config, commit, folder, [best.number], MAX_NEW_TOKENS)
            write_samples(folder, best, MAX_NEW_TOKENS, answers(answerer, best.number, chosen, pairs))
    except (LoraSearchError, OSError, RuntimeError, ValueError) as error:
        progress.event(f"no sample answers: {(str(error).splitlines() or [type(error).__name__])[0]}")


def answers(answerer: Answerer, trial: int, chosen: Sequence[Pair], pairs: Sequence[Pair]) -> list[Sample]:
    """Return the answers of base and trial to the prompts as trained."""
    prompts = [pair.prompt for pair in chosen]
    base, best = (answerer.complete(prompts, number) for number in (None, trial))
    questions = without_frame(prompts, [pair.prompt for pair in pairs])
    references = [plain_text(pair.completion, answerer.tokenizer) for pair in chosen]
    return [Sample(*texts) for texts in zip(questions, references, base, best, strict=True)]


def without_frame(prompts: Sequence[str], all_prompts: Sequence[str]) -> list[str]:
    """Return the prompts without the text that the chat template adds around each."""
    if len(set(all_prompts)) < 2:
        return list(prompts)
    before = os.path.commonprefix(list(all_prompts))
    after = os.path.commonprefix([text[::-1] for text in all_prompts])[::-1]
    begin = max(before.rfind(end) + 1 for end in "\n>]")  # the frame ends with a line or a control token
    end = min((at for mark in "\n<[" if (at := after.find(mark)) >= 0), default=len(after))
    return [text[begin : len(text) - (len(after) - end)].strip() for text in prompts]


def plain_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text without control tokens."""
    specials = sorted(map(str, tokenizer.all_special_tokens), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, specials)), "", text).strip() if specials else text.strip()
