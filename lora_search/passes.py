"""One pass: rows of many slots laid end to end through the frozen base; only completion tokens reach the
LM head.

Legend: T tokens of the pass, N completion tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_search.data import Example
from lora_search.dropout import threshold, token_keys
from lora_search.fused import fuse
from lora_search.lora import Plan, SlotBank

HEAD_CHUNK = 256  # completion tokens per LM-head matmul: 256 x 128k logits in bfloat16 are 66 MB
CACHED_ROWS = 16  # logits are turned into probabilities so many rows at a time: 16 x 49k in float32 are 3 MB


@dataclass(frozen=True)
class SlotRows:
    """What one slot puts into a pass. ``ordinals`` number the examples as its trial sees them, for dropout."""

    slot: int | None
    rows: Sequence[Example]
    seed: int = 0
    ordinals: Sequence[int] = ()
    dropout: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def num_completion_tokens(self) -> int:
        return sum(num_completion_tokens(row) for row in self.rows)


def num_completion_tokens(row: Example) -> int:
    return len(row.input_ids) - row.num_prompt_tokens


class CompletionNll(torch.autograd.Function):
    """NLL per completion token [N] from hidden states [N, D], chunk by chunk.

    A token's NLL depends on its own hidden state only, so its gradient (softmax minus one-hot, through the head)
    is taken on the way forward and scaled on the way back; no logits are kept.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_ND: torch.Tensor, head: nn.Linear, softcap: float | None, target_N: torch.Tensor
    ) -> torch.Tensor:
        losses, grads = [], []
        for hidden, target in zip(hidden_ND.split(HEAD_CHUNK), target_N.split(HEAD_CHUNK), strict=True):
            logits_NV = F.linear(hidden, head.weight, head.bias)
            losses.append(_nll_and_grad(logits_NV, softcap, target))
            grads.append(logits_NV @ head.weight)
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_ND * grad_outputs[0][:, None].to(grad_ND.dtype), None, None, None


def _nll_and_grad(logits_NV: torch.Tensor, softcap: float | None, target_N: torch.Tensor) -> torch.Tensor:
    """Return NLL [N] in float32 and turn the logits into its gradient, in place and in blocks that stay in cache."""
    losses = []
    for logits, target in zip(logits_NV.split(CACHED_ROWS), target_N.split(CACHED_ROWS), strict=True):
        bent = None if softcap is None else (logits.float() / softcap).tanh_()
        z = logits.to(_wide(logits)) if bent is None else bent * softcap
        chosen = z.gather(1, target[:, None])  # a copy: z changes below
        top = z.amax(1, keepdim=True)
        total = z.sub_(top).exp_().sum(1, keepdim=True)
        losses.append((total.log() + top - chosen)[:, 0])
        z.div_(total).scatter_add_(1, target[:, None], torch.full_like(total, -1.0))
        logits.copy_(z if bent is None else z.mul_(1.0 - bent.square_()))
    return torch.cat(losses)


def _nll(logits_NV: torch.Tensor, softcap: float | None, target_N: torch.Tensor) -> torch.Tensor:
    if softcap is not None:
        logits_NV = torch.tanh(logits_NV / softcap) * softcap
    return F.cross_entropy(logits_NV.to(_wide(logits_NV)), target_N, reduction="none")


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class PackedModel:
    """The frozen base as a function from packed rows to NLL per completion token."""

    def __init__(self, model: PreTrainedModel, bank: SlotBank) -> None:
        self.bank, self.device = bank, model.device
        self.decoder: nn.Module = model.base_model
        self.head: nn.Linear = model.get_output_embeddings()
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        fuse(model)

    def train_nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        """Return NLL per completion token [N_s] of each slot, in the order given, with a graph behind it."""
        hidden_ND, target_N = self._hidden(packs)
        nll_N: torch.Tensor = CompletionNll.apply(hidden_ND, self.head, self.softcap, target_N)  # type: ignore[no-untyped-call]
        return list(nll_N.split([pack.num_completion_tokens for pack in packs]))

    @torch.no_grad()
    def eval_nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        """Return NLL per completion token [N_s] of each slot, without dropout and without a graph."""
        hidden_ND, target_N = self._hidden(packs)
        chunks = zip(hidden_ND.split(HEAD_CHUNK), target_N.split(HEAD_CHUNK), strict=True)
        nll_N = torch.cat([_nll(self.head(hidden), self.softcap, target) for hidden, target in chunks])
        return list(nll_N.split([pack.num_completion_tokens for pack in packs]))

    def _hidden(self, packs: Sequence[SlotRows]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [row for pack in packs for row in pack.rows]
        lengths = [len(row.input_ids) for row in rows]
        ids_T = torch.tensor([token for row in rows for token in row.input_ids], device=self.device)
        position_T = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        boundaries = torch.tensor([0, *lengths], device=self.device).cumsum(0, dtype=torch.int32)
        self.bank.plan = self._plan(packs)
        try:
            output = self.decoder(
                input_ids=ids_T[None],
                position_ids=position_T[None],
                use_cache=False,
                cu_seq_lens_q=boundaries,
                max_length_q=max(lengths),
            )
        finally:
            self.bank.plan = None
        target_positions = torch.tensor(_completion_positions(rows), device=self.device)
        return output.last_hidden_state[0, target_positions - 1], ids_T[target_positions]

    def _plan(self, packs: Sequence[SlotRows]) -> Plan:
        """Return who owns which tokens, and what dropout hashes: one key a token, one threshold a slot."""
        slots = tuple(pack.slot for pack in packs)
        bounds = (0, *accumulate(pack.num_tokens for pack in packs))
        if not any(pack.dropout for pack in packs):
            return Plan(slots, bounds, None, None)
        keys = [
            token_keys(pack.seed, list(pack.ordinals) or [0] * len(pack.rows), [len(row.input_ids) for row in pack.rows], self.device)
            for pack in packs
        ]
        thresholds = torch.tensor([threshold(pack.dropout) for pack in packs], dtype=torch.int32)
        counts = torch.tensor([pack.num_tokens for pack in packs])
        return Plan(slots, bounds, torch.cat(keys), thresholds.repeat_interleave(counts).to(self.device))


def _completion_positions(rows: Sequence[Example]) -> list[int]:
    positions: list[int] = []
    start = 0
    for row in rows:
        positions.extend(range(start + row.num_prompt_tokens, start + len(row.input_ids)))
        start += len(row.input_ids)
    return positions
