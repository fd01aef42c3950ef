"""Sample answers for the report: base and best trial answer the same few validation questions, greedily.

Over the packed base that is loaded anyway; the answers are those of plain transformers and PEFT. Imports
torch.
"""

import os
from collections.abc import Sequence
from itertools import islice

from lora_search.engine.generation import generate
from lora_search.errors import DatabaseError, DoesNotFitError, InputError, WriteError
from lora_search.failures import first_line
from lora_search.results.samples import Sample, read_samples, write_samples
from lora_search.service.answering import decoded, reference_of, tokenizer_and_ends
from lora_search.service.scoring import Finished, adapter_of
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow

MAX_NEW_TOKENS = 96
LONGEST_PROMPT = 4096  # characters
REPORTED = (DatabaseError, DoesNotFitError, InputError, WriteError)  # an error of ``after_pass`` is none


def keep_samples_once(study: Finished, best: TrialRow | None) -> None:
    """Answer the first study.sample_answers questions with base and best trial, and write that to the
    study's folder, unless it is there or the adapter is not. A failure is reported and ends nothing,
    but for what ``after_pass`` raises."""
    folder, progress, pairs = study.folder, study.progress, study.engine.splits.pairs.get("validation", ())
    short = (number for number, pair in enumerate(pairs) if len(pair.prompt) <= LONGEST_PROMPT)
    chosen = list(islice(short, study.config.study.sample_answers))
    if best is None or best.state != "COMPLETE" or not chosen or not adapter_of(best, folder).is_dir():
        return
    if len(read_samples(folder, best)) >= len(chosen):
        return
    progress.event(f"base and trial {best.number} answer {len(chosen)} validation questions")
    try:
        write_samples(folder, best, MAX_NEW_TOKENS, answers(study, best, chosen))
    except (*REPORTED, OSError, RuntimeError, ValueError) as error:
        progress.event(f"no sample answers: {first_line(error)}")


def answers(study: Finished, best: TrialRow, chosen: Sequence[int]) -> list[Sample]:
    """Return what base and trial answer to the prompts of these validation rows, as trained."""
    engine, settings = study.engine, StudyView(study.config.study).settings_of(best.number)
    tokenizer, ends = tokenizer_and_ends(engine, study.config)
    examples = [engine.splits.validation[number] for number in chosen]
    prompts = [list(example.input_ids[: example.num_prompt_tokens]) for example in examples]
    slot = engine.place(settings, adapter_of(best, study.folder))
    try:
        found = generate(
            engine.model,
            [None, slot],
            prompts,
            ends,
            MAX_NEW_TOKENS,
            engine.tokens_per_pass,
            study.after_pass,
        )
    finally:
        engine.bank.release(slot)
    of_base, of_best = ([decoded(tokenizer, ids) for ids in own] for own in found)
    pairs = engine.splits.pairs["validation"]
    questions = without_frame([pairs[number].prompt for number in chosen], [pair.prompt for pair in pairs])
    references = [reference_of(engine, tokenizer, number) for number in chosen]
    return [Sample(*texts) for texts in zip(questions, references, of_base, of_best, strict=True)]


def without_frame(prompts: Sequence[str], all_prompts: Sequence[str]) -> list[str]:
    """Return the prompts without the text that the chat template adds around each."""
    if len(set(all_prompts)) < 2:
        return list(prompts)
    before = os.path.commonprefix(list(all_prompts))
    after = os.path.commonprefix([text[::-1] for text in all_prompts])[::-1]
    begin = max(before.rfind(end) + 1 for end in "\n>]")  # the frame ends with a line or a control token
    end = min((at for mark in "\n<[" if (at := after.find(mark)) >= 0), default=len(after))
    return [text[begin : len(text) - (len(after) - end)].strip() for text in prompts]
