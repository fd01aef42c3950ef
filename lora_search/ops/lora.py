"""The LoRA part of a layer: each slot's tokens go through its own adapter, in one autograd node.

Two implementations give the same numbers. `AddAdapters` loops over the slots, on views of the rank in use.
`AddGrouped` runs one grouped matmul over all slots, padded to the largest rank, on GPUs that have a kernel
for it (`bank.fits_grouped`): a loop over 32 slots and 200 layers would be 20,000 launches a pass. Gradients
of A and B are written straight into the bank: fewer nodes, no accumulation by autograd.

Legend: S slots, R rank, D input width, O output width, T tokens of a pass. B is kept transposed, [R, O].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from lora_search.ops.dropout import Mask


@dataclass(frozen=True)
class Plan:
    """Which slot each token of a pass belongs to: ``slots[i]`` has tokens ``bounds[i]`` to ``bounds[i + 1]``.

    Slot None is the bare base. Keys and thresholds (see `dropout`) are None if nothing is dropped. For
    grouped matmuls ``ends_S`` int32 holds the end of each slot's tokens, ``scaling_LT`` for each layer the
    scale of each token's adapter (one tensor where layers agree), ``idle_S`` bool the slots without tokens
    (None if there are none).
    """

    slots: tuple[int | None, ...]
    bounds: tuple[int, ...]
    key_T: torch.Tensor | None
    threshold_T: torch.Tensor | None
    ends_S: torch.Tensor | None = None
    scaling_LT: Sequence[torch.Tensor] | None = None
    idle_S: torch.Tensor | None = None


@dataclass(frozen=True)
class SlotAdapter:
    """One layer's adapter of one slot: views into the bank. ``scaling`` excludes 1 / (1 - dropout)."""

    a_RD: torch.Tensor
    b_RO: torch.Tensor
    grad_a_RD: torch.Tensor
    grad_b_RO: torch.Tensor
    scaling: float
    dropout: float


@dataclass(frozen=True)
class LayerBank:
    """One layer's adapters of all slots: views into the bank. Unused entries are zero."""

    a_SRD: torch.Tensor
    b_SRO: torch.Tensor
    grad_a_SRD: torch.Tensor
    grad_b_SRO: torch.Tensor


@dataclass(frozen=True)
class Dense:
    """A frozen linear layer whose weight is not packed."""

    weight_OD: torch.Tensor
    bias_O: torch.Tensor | None


class AddAdapters(torch.autograd.Function):
    """Adds dropout(x) A' B' scaling of each slot to its tokens of y, in place.

    y is the base layer's output; or None, and ``base`` gives the frozen layer. Then one node does both, which
    saves an addition of x's gradients for every layer.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: torch.Tensor | None,
        x: torch.Tensor,
        base: Dense | None,
        _anchor: torch.Tensor,
        adapters: Mapping[int | None, SlotAdapter],
        plan: Plan,
        layer: int,
    ) -> torch.Tensor:
        y = _output(ctx, y, x, base)
        x_TD, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        mask = _mask(plan, layer, x_TD)
        input_TD = x_TD if mask is None else mask.apply(x_TD)
        hiddens = []
        for adapter, rows in _parts(adapters, plan):
            scaling = adapter.scaling / (1.0 - adapter.dropout) if mask is not None else adapter.scaling
            hidden_TR = (input_TD[rows] @ adapter.a_RD.T).mul_(scaling)
            y_TO[rows].addmm_(hidden_TR, adapter.b_RO)
            hiddens.append(hidden_TR)
        ctx.save_for_backward(
            x, *hiddens
        )  # masks are recomputed: storing them would take as much memory as the activations
        ctx.adapters, ctx.plan, ctx.layer, ctx.base = adapters, plan, layer, base  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(
        ctx: FunctionCtx, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None, None]:
        x, *hiddens = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_TO = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        x_TD = x.reshape(-1, x.shape[-1])
        mask = _mask(ctx.plan, ctx.layer, x_TD)  # type: ignore[attr-defined]
        input_TD = x_TD if mask is None else mask.apply(x_TD)
        grad_x_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[1] else None  # type: ignore[attr-defined]
        parts = _parts(ctx.adapters, ctx.plan)  # type: ignore[attr-defined]
        for (adapter, rows), hidden_TR in zip(parts, hiddens, strict=True):
            scaling = adapter.scaling / (1.0 - adapter.dropout) if mask is not None else adapter.scaling
            grad_hidden_TR = (grad_TO[rows] @ adapter.b_RO.T).mul_(scaling)
            adapter.grad_b_RO.add_(hidden_TR.T @ grad_TO[rows])
            adapter.grad_a_RD.add_(grad_hidden_TR.T @ input_TD[rows])
            if grad_x_TD is not None:
                torch.mm(grad_hidden_TR, adapter.a_RD, out=grad_x_TD[rows])
        if grad_x_TD is not None and mask is not None:
            grad_x_TD = mask.apply_(grad_x_TD)
        return *_grads(ctx, grad_outputs[0], grad_TO, grad_x_TD, x), None, None, None, None, None


class AddGrouped(torch.autograd.Function):
    """AddAdapters for all slots at once. Unused ranks, layers and slots are zero and so are their gradients.
    Tokens must be in the order of the slots."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: torch.Tensor | None,
        x: torch.Tensor,
        base: Dense | None,
        _anchor: torch.Tensor,
        bank: LayerBank,
        plan: Plan,
        layer: int,
    ) -> torch.Tensor:
        assert plan.ends_S is not None
        assert plan.scaling_LT is not None
        x_TD = x.reshape(-1, x.shape[-1])
        mask = _mask(plan, layer, x_TD)
        input_TD = x_TD if mask is None else mask.apply(x_TD)
        hidden_TR = F.grouped_mm(input_TD, bank.a_SRD.mT, offs=plan.ends_S).mul_(
            plan.scaling_LT[layer][:, None]
        )
        y = _sum(ctx, y, x, base, F.grouped_mm(hidden_TR, bank.b_SRO, offs=plan.ends_S))
        ctx.save_for_backward(x, hidden_TR)
        ctx.bank, ctx.plan, ctx.layer, ctx.base = bank, plan, layer, base  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(
        ctx: FunctionCtx, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None, None]:
        x, hidden_TR = ctx.saved_tensors  # type: ignore[attr-defined]
        bank, plan = ctx.bank, ctx.plan  # type: ignore[attr-defined]
        grad_TO = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        x_TD = x.reshape(-1, x.shape[-1])
        mask = _mask(plan, ctx.layer, x_TD)  # type: ignore[attr-defined]
        input_TD = x_TD if mask is None else mask.apply(x_TD)
        ends_S = plan.ends_S
        grad_hidden_TR = F.grouped_mm(grad_TO, bank.b_SRO.mT, offs=ends_S)
        grad_hidden_TR.mul_(plan.scaling_LT[ctx.layer][:, None])  # type: ignore[attr-defined]
        bank.grad_b_SRO.add_(_without_idle(F.grouped_mm(hidden_TR.mT, grad_TO, offs=ends_S), plan))
        bank.grad_a_SRD.add_(_without_idle(F.grouped_mm(grad_hidden_TR.mT, input_TD, offs=ends_S), plan))
        grad_x_TD = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            grad_x_TD = F.grouped_mm(grad_hidden_TR, bank.a_SRD, offs=ends_S)
            if mask is not None:
                grad_x_TD = mask.apply_(grad_x_TD)
        return *_grads(ctx, grad_outputs[0], grad_TO, grad_x_TD, x), None, None, None, None, None


def _output(ctx: FunctionCtx, y: torch.Tensor | None, x: torch.Tensor, base: Dense | None) -> torch.Tensor:
    """Return the base layer's output, to be added to."""
    if base is not None:
        return F.linear(x, base.weight_OD, base.bias_O)
    assert y is not None
    ctx.mark_dirty(y)
    return y


def _sum(
    ctx: FunctionCtx, y: torch.Tensor | None, x: torch.Tensor, base: Dense | None, added_TO: torch.Tensor
) -> torch.Tensor:
    """Return the base layer's output plus ``added_TO``, which the base's matmul itself adds to."""
    if base is None:
        assert y is not None
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).add_(added_TO)
        return y
    added_TO.addmm_(x.reshape(-1, x.shape[-1]), base.weight_OD.T)
    if base.bias_O is not None:
        added_TO += base.bias_O
    shape = (*x.shape[:-1], len(base.weight_OD))
    return cast(torch.Tensor, torch.ops.aten._unsafe_view(added_TO, shape))  # models may change it in place


def _grads(
    ctx: FunctionCtx,
    grad: torch.Tensor,
    grad_TO: torch.Tensor,
    grad_x_TD: torch.Tensor | None,
    x: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of y and x; ``grad_x_TD`` is the adapters' part of x's, and is overwritten. The
    base's part is added by its matmul itself."""
    base: Dense | None = ctx.base  # type: ignore[attr-defined]
    if base is not None and grad_x_TD is not None:
        grad_x_TD.addmm_(grad_TO, base.weight_OD)
    grad_x = None if grad_x_TD is None else grad_x_TD.view_as(x)
    return grad if base is None else None, grad_x


def _without_idle(grad_SRW: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Zero the gradients of slots without tokens: on capability 10.x an empty group returns uninitialised
    accumulators (pytorch issue 172439)."""
    return grad_SRW if plan.idle_S is None else grad_SRW.masked_fill_(plan.idle_S[:, None, None], 0.0)


def _mask(plan: Plan, layer: int, x_TD: torch.Tensor) -> Mask | None:
    if plan.key_T is None or plan.threshold_T is None:
        return None
    return Mask(plan.key_T, plan.threshold_T, layer, x_TD.shape[1], x_TD.dtype)


def _parts(adapters: Mapping[int | None, SlotAdapter], plan: Plan) -> Iterator[tuple[SlotAdapter, slice]]:
    for slot, start, end in zip(plan.slots, plan.bounds, plan.bounds[1:], strict=False):
        if slot in adapters:
            yield adapters[slot], slice(start, end)
