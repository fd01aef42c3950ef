"""One pass: rows of many slots laid end to end through the frozen base; only completion tokens reach the
LM head.

Legend: T tokens of the pass, N completion tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_search.data import Example
from lora_search.dropout import token_keys
from lora_search.lora import Segment, SlotBank

HEAD_CHUNK = 256  # completion tokens per LM-head chunk: 256 x 128k logits in float32 are 131 MB


@dataclass(frozen=True)
class SlotRows:
    """What one slot puts into a pass. ``ordinals`` number the examples as its trial sees them; None: no
    dropout."""

    slot: int | None
    seed: int
    rows: Sequence[Example]
    ordinals: Sequence[int] | None

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

    A token's NLL depends on its own hidden state only, so the gradient of the sum, taken by autograd
    within each chunk on the way forward, is the gradient of every token; no logits are kept.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_ND: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        target_N: torch.Tensor,
    ) -> torch.Tensor:
        losses, grads = [], []
        for hidden, target in zip(hidden_ND.split(HEAD_CHUNK), target_N.split(HEAD_CHUNK), strict=True):
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                nll = F.cross_entropy(head(leaf).float(), target, reduction="none")
                grads.append(torch.autograd.grad(nll.sum(), leaf)[0])
            losses.append(nll.detach())
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_ND * grad_outputs[0][:, None].to(grad_ND.dtype), None, None


class PackedModel:
    """The frozen base as a function from packed rows to NLL per completion token."""

    def __init__(self, model: PreTrainedModel, bank: SlotBank) -> None:
        self.bank, self.device = bank, model.device
        self.decoder: nn.Module = model.base_model
        output = model.get_output_embeddings()
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.head: Callable[[torch.Tensor], torch.Tensor] = (
            output if softcap is None else lambda hidden: torch.tanh(output(hidden) / softcap) * softcap
        )

    def train_nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        """Return NLL per completion token [N_s] of each slot, in the order given, with a graph behind it."""
        hidden_ND, target_N = self._hidden(packs)
        nll_N: torch.Tensor = CompletionNll.apply(hidden_ND, self.head, target_N)  # type: ignore[no-untyped-call]
        return list(nll_N.split([pack.num_completion_tokens for pack in packs]))

    @torch.no_grad()
    def eval_nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        """Return NLL per completion token [N_s] of each slot, without dropout and without a graph."""
        hidden_ND, target_N = self._hidden(packs)
        chunks = zip(hidden_ND.split(HEAD_CHUNK), target_N.split(HEAD_CHUNK), strict=True)
        nll_N = torch.cat([F.cross_entropy(self.head(h).float(), t, reduction="none") for h, t in chunks])
        return list(nll_N.split([pack.num_completion_tokens for pack in packs]))

    def _hidden(self, packs: Sequence[SlotRows]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [row for pack in packs for row in pack.rows]
        lengths = [len(row.input_ids) for row in rows]
        ids_T = torch.tensor([token for row in rows for token in row.input_ids], device=self.device)
        position_T = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        boundaries = torch.tensor([0, *lengths], device=self.device).cumsum(0, dtype=torch.int32)
        self.bank.segments = [self._segment(pack) for pack in packs]
        try:
            output = self.decoder(
                input_ids=ids_T[None],
                position_ids=position_T[None],
                use_cache=False,
                cu_seq_lens_q=boundaries,
                max_length_q=max(lengths),
            )
        finally:
            self.bank.segments = ()
        target_positions = torch.tensor(_completion_positions(rows), device=self.device)
        return output.last_hidden_state[0, target_positions - 1], ids_T[target_positions]

    def _segment(self, pack: SlotRows) -> Segment:
        lengths = [len(row.input_ids) for row in pack.rows]
        keys = None
        if pack.ordinals is not None:
            keys = token_keys(pack.seed, list(pack.ordinals), lengths, self.device)
        return Segment(pack.slot, sum(lengths), keys)


def _completion_positions(rows: Sequence[Example]) -> list[int]:
    positions: list[int] = []
    start = 0
    for row in rows:
        positions.extend(range(start + row.num_prompt_tokens, start + len(row.input_ids)))
        start += len(row.input_ids)
    return positions
