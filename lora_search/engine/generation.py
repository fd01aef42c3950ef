"""Greedy answers of several slots at once over the packed base, with a cache of keys and values.

Rows are padded on the left, slot after slot; the base's matmuls run once over all of them, the LoRA part
per slot, attention by PyTorch's own kernel. The same answers as plain PEFT, one trial at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lora_search.engine.packed_model import PackedModel, SlotTokens
from lora_search.model.packing_check import own_attention
from lora_search.ops.device import give_back_memory, is_out_of_memory


@torch.no_grad()
def generate(
    model: PackedModel,
    slots: Sequence[int | None],
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    max_new_tokens: int,
    tokens_per_pass: int,
    after_pass: Callable[[], None] = lambda: None,
) -> list[list[list[int]]]:
    """Return each slot's answer to each prompt, as token ids without what ends it; slot None is the base.

    Prompts of like length share a batch, so large that its tokens fit ``tokens_per_pass``, at least one.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    answers: list[list[list[int]]] = [[[] for _ in prompts] for _ in slots]
    longest = max(map(len, prompts)) + max_new_tokens
    size, start = max(1, tokens_per_pass // (longest * len(slots))), 0
    with plain_attention(model.language_model):
        while start < len(order):
            numbers = order[start : start + size]
            try:
                found = _batch(model, slots, [prompts[n] for n in numbers], ends,
                               max_new_tokens)  # fmt: skip
            except RuntimeError as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                size = max(1, size // 2)
                give_back_memory(model.device)
                continue
            for place in range(len(slots)):
                for row, number in enumerate(numbers):
                    answers[place][number] = found[place * len(numbers) + row]
            start += len(numbers)
            after_pass()
    return answers


def _batch(
    model: PackedModel,
    slots: Sequence[int | None],
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the answers, slot by slot."""
    longest, pad = max(map(len, prompts)), ends[0]
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts] * len(slots)
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts] * len(slots)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(ends), pad_token_id=pad
    )
    with each_slot_its_rows(model, slots, len(prompts)):
        out = model.language_model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(masks, device=model.device),
            generation_config=settings,
        )
    return [_until(row[longest:].tolist(), ends) for row in out]


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


@contextmanager
def each_slot_its_rows(model: PackedModel, slots: Sequence[int | None], num_rows: int) -> Iterator[None]:
    """Before every step of the decoder, tell the bank which tokens belong to which slot: each slot has
    ``num_rows`` of them, one after the other."""

    def plan(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if named.get("input_ids") is not None else named.get("inputs_embeds")
        width = (arguments[0] if ids is None else ids).shape[1]
        model.set_plan([SlotTokens(slot, num_rows * width) for slot in slots])

    def set_logits(_: nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> None:
        for place, slot in enumerate(slots):
            own = model.bank.heads.get(slot) or model.bank.tokens_of_head.get(slot)
            if own is not None:
                rows = slice(place * num_rows, (place + 1) * num_rows)
                mine, hidden = (tensor[rows].flatten(0, 1) for tensor in (logits, inputs[0]))
                own.set_logits(mine, hidden)

    head = model.language_model.get_output_embeddings()
    handles = [
        model.decoder.register_forward_pre_hook(plan, with_kwargs=True),
        head.register_forward_hook(set_logits),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend row by row with a mask and a cache, as transformers does by itself."""
    before = model.config._attn_implementation
    model.set_attn_implementation(own_attention(model))
    try:
        yield
    finally:
        model.set_attn_implementation(before)
