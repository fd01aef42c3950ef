"""Trained rows of the embedding, of each slot its own, as PEFT's `trainable_token_indices`; and of the head
where it is tied to the embedding.

Legend: K trained tokens, D width, T tokens of a pass, N completion tokens, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import FunctionCtx

from lora_search.ops.lora import Plan, parts_of


@dataclass(frozen=True)
class Tokens:
    """One slot's rows in place of the embedding's: views into the bank. ``ids_K`` int64."""

    ids_K: torch.Tensor
    e_KD: torch.Tensor
    grad_KD: torch.Tensor

    def set_logits(self, logits_NV: torch.Tensor, hidden_ND: torch.Tensor) -> None:
        """Put the logits of these rows in place of the head's."""
        logits_NV.index_copy_(1, self.ids_K, hidden_ND @ self.e_KD.T)

    def take(self, grad_NV: torch.Tensor) -> torch.Tensor:
        """Return the logits' gradient [N, K] of these rows, and leave zeros there."""
        grad_NK = grad_NV[:, self.ids_K]
        grad_NV.index_fill_(1, self.ids_K, 0.0)
        return grad_NK


Parts = Sequence[tuple[Tokens, slice]]  # slots' rows of the head, and their completion tokens in the pass


def within(parts: Parts, start: int, stop: int) -> Iterator[tuple[Tokens, slice]]:
    """Yield the parts that have tokens from ``start`` to ``stop``, counted from there."""
    for tokens, rows in parts:
        if rows.start < stop and rows.stop > start:
            yield tokens, slice(max(rows.start - start, 0), min(rows.stop, stop) - start)


class Embed(torch.autograd.Function):
    """Puts each slot's rows in place of the embeddings of its tokens; ``scale`` is the embedding's factor."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        embedded: torch.Tensor,
        ids: torch.Tensor,
        scale: torch.Tensor | None,
        _anchor: torch.Tensor,
        tokens: Mapping[int | None, Tokens],
        plan: Plan,
    ) -> torch.Tensor:
        embedded = embedded.clone()
        y_TD, ids_T = embedded.view(-1, embedded.shape[-1]), ids.reshape(-1)
        hits = []
        for trained, rows in parts_of(tokens, plan):
            hit_TK = ids_T[rows][:, None] == trained.ids_K
            row_TD = _scaled(trained.e_KD[hit_TK.int().argmax(1)], scale)
            y_TD[rows] = torch.where(hit_TK.any(1, keepdim=True), row_TD, y_TD[rows])
            hits.append(hit_TK)
        ctx.save_for_backward(*hits)
        ctx.rest = scale, tokens, plan  # type: ignore[attr-defined]
        return embedded

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: torch.Tensor) -> tuple[None, None, None, None, None, None]:
        scale, tokens, plan = ctx.rest  # type: ignore[attr-defined]
        grad_TD = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        parts = parts_of(tokens, plan)
        for (trained, rows), hit_TK in zip(parts, ctx.saved_tensors, strict=True):  # type: ignore[attr-defined]
            trained.grad_KD.add_(hit_TK.T.to(grad_TD.dtype) @ _scaled(grad_TD[rows], scale))
        return None, None, None, None, None, None


def _scaled(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return x if scale is None else x * scale.to(x.dtype)
