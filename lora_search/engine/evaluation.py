"""Validation perplexity of several slots at once, packed, without gradients."""

import math
from collections.abc import Callable, Sequence

import torch

from lora_search.data.rows import Example
from lora_search.engine.packed_model import PackedModel, SlotRows, num_completion_tokens
from lora_search.engine.packing import common_prefix, passes_in_order

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}  # relative, of a row's NLL


@torch.no_grad()
def shareable_tokens(model: PackedModel, rows: Sequence[Example]) -> int:
    """Return how many tokens all rows begin with: system prompt and the like, computed once for all of them.

    The last token of a prompt predicts a completion, so it is never among them. 0 where the device's
    attention does not take rows with fewer queries than keys as it should: seen on the two shortest rows and,
    for the sake of windows, on the longest one.
    """
    *_, longest = by_length = sorted(rows, key=lambda row: len(row.input_ids))
    shortest_prompt = min(row.num_prompt_tokens for row in rows)
    num_shared = min(common_prefix([row.input_ids for row in rows]), shortest_prompt - 1)
    if len(rows) < 2 or num_shared < 1:
        return 0
    try:
        error = max(_error_of_sharing(model, probe, num_shared) for probe in (by_length[:2], [longest]))
    except RuntimeError:  # a kernel that does not take them at all
        return 0
    return num_shared if error <= ROUNDING.get(model.dtype, 0.0) else 0


def _error_of_sharing(model: PackedModel, rows: Sequence[Example], num_shared: int) -> float:
    alone, shared = (model.nll([SlotRows(None, rows, num_shared=number)])[0] for number in (0, num_shared))
    return float((alone - shared).norm() / alone.norm())


@torch.no_grad()
def perplexities(
    model: PackedModel,
    slots: Sequence[int | None],
    rows: Sequence[Example],
    tokens_per_pass: int,
    num_shared: int = 0,
    after_pass: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return exp(mean NLL over all completion tokens), token-weighted, of each slot on the same rows."""
    rows = sorted(rows, key=lambda row: len(row.input_ids))  # attention takes rows of like length together
    sums = [torch.zeros((), dtype=torch.float64, device=model.device) for _ in slots]
    lengths = [len(row.input_ids) for row in rows]
    for taken in passes_in_order(len(slots), lengths, num_shared, tokens_per_pass):
        packs = [
            SlotRows(slots[i], [rows[number] for number in numbers], num_shared=num_shared)
            for i, numbers in taken.items()
        ]
        for i, nll in zip(taken, model.nll(packs), strict=True):
            sums[i] += nll.sum(dtype=torch.float64)
        after_pass()
    count = sum(num_completion_tokens(row) for row in rows)
    return [_exp(total.item() / count) for total in sums]


def _exp(mean_nll: float) -> float:
    """Return exp, or infinity where a float overflows."""
    return math.exp(mean_nll) if mean_nll < 700 else math.inf
