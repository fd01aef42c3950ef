"""Validation perplexity of several slots at once, packed, without gradients."""

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch

from lora_search.data import Example
from lora_search.packing import fill_pass
from lora_search.passes import PackedModel, SlotRows, num_completion_tokens


@torch.no_grad()
def perplexities(
    model: PackedModel,
    slots: Sequence[int | None],
    rows: Sequence[Example],
    tokens_per_pass: int,
    after_pass: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return exp(mean NLL over all completion tokens), token-weighted, of each slot on the same rows."""
    queues = [deque(rows) for _ in slots]
    sums = [torch.zeros((), dtype=torch.float64, device=model.device) for _ in slots]
    while any(queues):
        taken = fill_pass([[len(row.input_ids) for row in queue] for queue in queues], tokens_per_pass)
        chosen = [i for i, count in enumerate(taken) if count]
        packs = [SlotRows(slots[i], [queues[i].popleft() for _ in range(taken[i])]) for i in chosen]
        for i, nll in zip(chosen, model.nll(packs), strict=True):
            sums[i] += nll.sum(dtype=torch.float64)
        after_pass()
    count = sum(num_completion_tokens(row) for row in rows)
    return [_exp(total.item() / count) for total in sums]


def _exp(mean_nll: float) -> float:
    """Return exp, or infinity where a float overflows."""
    return math.exp(mean_nll) if mean_nll < 700 else math.inf
