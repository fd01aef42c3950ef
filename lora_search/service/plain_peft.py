"""Adapters in plain transformers and PEFT, as users will run them: answers, merged weights, their perplexity.

Does not use the packed engine, so it is an independent check. Imports torch.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from lora_search.data.rows import Example
from lora_search.data.serving import end_tokens
from lora_search.data.templates import render
from lora_search.errors import StudyError
from lora_search.files.peft import Tuned, merge_adapter
from lora_search.model.loading import load_tokenizer, pin_model, place, resolve_model
from lora_search.ops.device import keep_to_own_cores, pick_dtype
from lora_search.output.shared_files import adapter_here
from lora_search.output.streams import clean
from lora_search.reading.rows import Row
from lora_search.service.reopen import identity_of
from lora_search.settings.schema import SweepConfig

EXACT = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of a merged model's perplexity


def load_plain(config: SweepConfig, commit: str | None) -> PreTrainedModel:
    """Return the study's base in plain transformers, in its dtype, never quantized."""
    keep_to_own_cores()
    source = resolve_model(config.model)
    model = pin_model(source, config.model, commit)
    places = place(source, replace(model, quantization=None), config.engine)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=pick_dtype(config.engine.dtype, list(places.values())[-1]),
        device_map=places,
    )
    return loaded.eval()


@torch.no_grad()
def plain_perplexity(model: PreTrainedModel, rows: Sequence[Example]) -> float:
    """Return exp of the mean NLL over all completion tokens, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        ids_T = torch.tensor(row.input_ids, device=model.device)
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        for start, stop in row.learnt:
            nll = torch.nn.functional.cross_entropy(
                logits_TV[start - 1 : stop - 1], ids_T[start:stop], reduction="sum"
            )
            total, count = total + nll.item(), count + stop - start
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def merge(
    config: SweepConfig, commit: str | None, adapter: Path, serving: Path, to: Path,
    rows: Sequence[Example], expected: float,
) -> tuple[float, str]:  # fmt: skip
    """Write base plus adapter as one model, load it again, and compare its perplexity with the study's.
    Return its perplexity and dtype.

    Raises StudyError, and leaves no files, if they differ by more than the rounding of the base's dtype. An
    adapter of a 4-bit base is merged into the unquantized base, where a difference is expected.
    """
    fresh = to.with_name(f"{to.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    merge_adapter(load_plain(config, commit), adapter, fresh)
    for file in sorted(path for path in serving.glob("*") if path.is_file()):
        shutil.copy(file, fresh / file.name)
    model = AutoModelForCausalLM.from_pretrained(fresh, dtype="auto").eval()
    perplexity = plain_perplexity(model, rows)
    tolerance = EXACT[model.dtype] if config.model.quantization is None else float("inf")
    if not abs(perplexity / expected - 1) <= tolerance:
        shutil.rmtree(fresh)
        raise StudyError(
            f"merge: the merged model has validation perplexity {perplexity:.4f}, the study says "
            f"{expected:.4f}: too different for rounding to {model.dtype}. Export the adapter without merge."
        )
    shutil.rmtree(to, ignore_errors=True)
    fresh.rename(to)
    return perplexity, str(model.dtype).removeprefix("torch.")


class Answerer:
    """Answers with the base, loaded once, either bare (None) or with the adapter of a trial."""

    def __init__(self, config: SweepConfig, folder: Path, trials: Sequence[int], max_new_tokens: int) -> None:
        """Raises StudyError if the adapter of one of these trials is missing."""
        adapters = {str(number): adapter_here(folder, number) for number in trials}
        source, commit = resolve_model(config.model), identity_of(config).commit
        self.tokenizer = load_tokenizer(source, pin_model(source, config.model, commit))
        base = load_plain(config, commit)
        own = base.generation_config.to_diff_dict()
        self.ends = end_tokens(config.template, self.tokenizer, own)
        self.tuned = Tuned(base, adapters)
        self.template, self.max_new_tokens, self.device = config.template, max_new_tokens, base.device

    def stream(self, question: str, trial: int | None) -> str:
        """Print the greedy answer as it comes, and return it."""
        return self._answer([self._prompt(question)], trial, AnswerStream(self.tokenizer))[0]

    def answer_all(self, questions: Sequence[str], trial: int | None, batch_size: int) -> list[str]:
        """Return the greedy answers in the order of the questions."""
        prompts = list(map(self._prompt, questions))
        found: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # batches of similar length
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found |= dict(zip(batch, self._answer([prompts[i] for i in batch], trial), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _prompt(self, question: str) -> str:
        return render(Row(question, "", "-", ""), self.template, self.tokenizer).prompt

    def _answer(
        self, prompts: Sequence[str], trial: int | None, streamer: TextStreamer | None = None
    ) -> list[str]:
        """Answer in one batch, padded on the left."""
        ids = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        longest, pad = max(map(len, ids)), self.ends[0]
        padded = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=self.device)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=self.max_new_tokens, eos_token_id=self.ends, pad_token_id=pad
        )
        with torch.no_grad(), self.tuned.using(None if trial is None else str(trial)) as model:
            out = model.generate(
                input_ids=padded, attention_mask=mask, generation_config=settings, streamer=streamer
            )
        return [str(self.tokenizer.decode(row[longest:], skip_special_tokens=True)).strip() for row in out]


class AnswerStream(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Prints an answer to standard output word by word, with control characters escaped."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        sys.stdout.write(clean(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()
