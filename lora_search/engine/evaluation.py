"""The NLL of every row under several slots at once, packed, without gradients."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lora_search.data.rows import Example
from lora_search.engine.packed_model import PackedModel, SlotRows, num_completion_tokens
from lora_search.engine.packing import common_prefix, passes_in_order
from lora_search.trial import RowScores

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}  # relative, of a row's NLL


@torch.no_grad()
def shareable_tokens(model: PackedModel, rows: Sequence[Example]) -> int:
    """Return how many tokens all rows begin with: system prompt and the like, computed once for all of them.

    The last token of a prompt predicts a completion, so it is never among them. Returns 0 if the device's
    attention gives wrong results for rows with fewer queries than keys, tested on the two shortest rows and,
    because of sliding windows, on the longest one.
    """
    *_, longest = by_length = sorted(rows, key=lambda row: len(row.input_ids))
    shortest_prompt = min(row.num_prompt_tokens for row in rows)
    num_shared = min(common_prefix([row.input_ids for row in rows]), shortest_prompt - 1)
    if len(rows) < 2 or num_shared < 1 or model.is_row_by_row:
        return 0
    try:
        error = max(_error_of_sharing(model, probe, num_shared) for probe in (by_length[:2], [longest]))
    except RuntimeError:  # a kernel that does not support them
        return 0
    return num_shared if error <= ROUNDING.get(model.dtype, 0.0) else 0


def _error_of_sharing(model: PackedModel, rows: Sequence[Example], num_shared: int) -> float:
    alone, shared = (model.nll([SlotRows(None, rows, num_shared=number)])[0] for number in (0, num_shared))
    return float((alone - shared).norm() / alone.norm())


@torch.no_grad()
def score_rows(
    model: PackedModel,
    slots: Sequence[int | None],
    rows: Sequence[Example],
    tokens_per_pass: int,
    num_shared: int = 0,
    after_pass: Callable[[], None] = lambda: None,
) -> list[RowScores]:
    """Return the NLL of each row under each slot, rows in the order given; one synchronisation in all."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))  # similar lengths share a pass
    place = np.argsort(order)
    rows = [rows[i] for i in order]
    parts: list[list[torch.Tensor]] = [[] for _ in slots]
    lengths = [len(row.input_ids) for row in rows]
    for taken in passes_in_order(len(slots), lengths, num_shared, tokens_per_pass):
        packs = [
            SlotRows(slots[i], [rows[number] for number in numbers], num_shared=num_shared)
            for i, numbers in taken.items()
        ]
        for i, nll in zip(taken, model.nll(packs), strict=True):
            parts[i].append(_sum_rows(nll, [rows[number] for number in taken[i]]))
        after_pass()
    tokens_R = np.array([num_completion_tokens(row) for row in rows], dtype=np.int64)[place]
    return [RowScores(torch.cat(part).cpu().numpy()[place], tokens_R) for part in parts]


def _sum_rows(nll_N: torch.Tensor, rows: Sequence[Example]) -> torch.Tensor:
    """Return the sum of each row's tokens, float64 [R]; in the same order on every device."""
    counts = torch.tensor([num_completion_tokens(row) for row in rows])
    counts_R = counts.to(nll_N.device, non_blocking=True)
    return torch.segment_reduce(nll_N.double(), "sum", lengths=counts_R, unsafe=True)
