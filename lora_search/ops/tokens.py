"""Trained rows of embedding and head, of each slot its own: some, as PEFT's `trainable_token_indices`, or
all, as its `modules_to_save`.

Legend: K trained tokens, D width, T tokens of a pass, N completion tokens, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import FunctionCtx

from lora_search.ops.lora import Plan, parts_of


@dataclass(frozen=True)
class Tokens:
    """One slot's rows in place of the embedding's or the head's: views into the bank. ``ids_K`` int64."""

    ids_K: torch.Tensor
    e_KD: torch.Tensor
    grad_KD: torch.Tensor

    def embedded(
        self, ids_T: torch.Tensor, base_TD: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the base's embeddings with these rows in place of theirs."""
        hit_TK = self._hits(ids_T)
        row_TD = _scaled(self.e_KD[hit_TK.int().argmax(1)], scale)
        return torch.where(hit_TK.any(1, keepdim=True), row_TD, base_TD)

    def collect(self, ids_T: torch.Tensor, grad_TD: torch.Tensor) -> None:
        """Add to the gradient what the tokens' embeddings have."""
        self.grad_KD.add_(self._hits(ids_T).T.to(grad_TD.dtype) @ grad_TD)

    def _hits(self, ids_T: torch.Tensor) -> torch.Tensor:
        return ids_T[:, None] == self.ids_K

    def set_logits(self, logits_NV: torch.Tensor, hidden_ND: torch.Tensor) -> None:
        """Put the logits of these rows in place of the head's."""
        logits_NV.index_copy_(1, self.ids_K, hidden_ND @ self.e_KD.T)

    def take(self, grad_NV: torch.Tensor) -> torch.Tensor:
        """Return the logits' gradient [N, K] of these rows, and leave zeros there."""
        grad_NK = grad_NV[:, self.ids_K]
        grad_NV.index_fill_(1, self.ids_K, 0.0)
        return grad_NK


@dataclass(frozen=True)
class Whole:
    """One slot's own embedding or head: views into the bank. ``untrained``: the row of a padding token."""

    e_VD: torch.Tensor
    grad_VD: torch.Tensor
    untrained: int | None = None

    def embedded(self, ids_T: torch.Tensor, _: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Return the embeddings."""
        return _scaled(self.e_VD[ids_T], scale)

    def collect(self, ids_T: torch.Tensor, grad_TD: torch.Tensor) -> None:
        """Add to the gradient what the tokens' embeddings have, in the same order each time: index_add_ on
        CUDA and index_put_ on CPUs have none."""
        wide_TD = grad_TD.to(self.grad_VD.dtype)
        if wide_TD.is_cuda:
            self.grad_VD.index_put_((ids_T,), wide_TD, accumulate=True)
        else:
            self.grad_VD.index_add_(0, ids_T, wide_TD)
        if self.untrained is not None:
            self.grad_VD[self.untrained].zero_()

    def collect_logits(self, grad_NV: torch.Tensor, hidden_ND: torch.Tensor) -> None:
        """Add to the gradient what the logits have."""
        if self.grad_VD.dtype == grad_NV.dtype:
            self.grad_VD.addmm_(grad_NV.T, hidden_ND)
        else:
            self.grad_VD.add_(grad_NV.T @ hidden_ND)

    def set_logits(self, logits_NV: torch.Tensor, hidden_ND: torch.Tensor) -> None:
        """Put this head's logits in place of the base's."""
        torch.mm(hidden_ND, self.e_VD.T, out=logits_NV)


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
        owned: Mapping[int | None, Tokens | Whole],
        plan: Plan,
    ) -> torch.Tensor:
        embedded = embedded.clone()
        y_TD, ids_T = embedded.view(-1, embedded.shape[-1]), ids.reshape(-1)
        for own, rows in parts_of(owned, plan):
            y_TD[rows] = own.embedded(ids_T[rows], y_TD[rows], scale)
        ctx.save_for_backward(ids_T)
        ctx.rest = scale, owned, plan  # type: ignore[attr-defined]
        return embedded

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: torch.Tensor) -> tuple[None, None, None, None, None, None]:
        scale, owned, plan = ctx.rest  # type: ignore[attr-defined]
        (ids_T,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_TD = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        for own, rows in parts_of(owned, plan):
            own.collect(ids_T[rows], _scaled(grad_TD[rows], scale))
        return None, None, None, None, None, None


def _scaled(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return x if scale is None else x * scale.to(x.dtype)
