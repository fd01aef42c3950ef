"""The LoRA part of a layer: each slot's tokens go through its own adapter, in one autograd node.

Three products make it, forward and backward, for A as for B: `narrow` to the rank, `widen` from it, `collect`
gradients into the bank (no nodes, no accumulation by autograd). The plain ones here loop over the slots and
run on any device; `lora_kernels` has each as one kernel for all slots. `engine.bank` chooses.

Legend: S slots, R rank, D input width, O output width, W one of them, T tokens. B is kept transposed, [R, O].
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar, cast

import torch
from torch.autograd.function import FunctionCtx

from lora_search.ops.dropout import Mask
from lora_search.ops.fused import gate_functions

A, B = 0, 1  # the side of an adapter that a product is with
TILE = 64  # tokens of a kernel's program
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Which slot each token of a pass belongs to: ``slots[i]`` has tokens ``bounds[i]`` to ``bounds[i + 1]``.

    Slot None is the bare base. Keys and thresholds (see `dropout`) are None if nothing is dropped. For
    kernels, ``parts_P3`` and ``tiles_N3`` int32 hold (slot, first token, end): of each slot, and in pieces.
    """

    slots: tuple[int | None, ...]
    bounds: tuple[int, ...]
    key_T: torch.Tensor | None
    threshold_T: torch.Tensor | None
    parts_P3: torch.Tensor | None = None
    tiles_N3: torch.Tensor | None = None

    @property
    def drops(self) -> bool:
        return self.key_T is not None

    def on(self, device: torch.device) -> "Plan":
        """Return the plan with its tensors on that device."""
        tensors = (self.key_T, self.threshold_T, self.parts_P3, self.tiles_N3)
        moved = (None if x is None else x.to(device, non_blocking=True) for x in tensors)
        return Plan(self.slots, self.bounds, *moved)


@dataclass(frozen=True)
class SlotAdapter:
    """One layer's adapter of one slot: views into the bank. ``scaling`` excludes 1 / (1 - dropout)."""

    a_RD: torch.Tensor
    b_RO: torch.Tensor
    grad_a_RD: torch.Tensor
    grad_b_RO: torch.Tensor
    scaling: float
    dropout: float

    @property
    def rank(self) -> int:
        return len(self.a_RD)

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a_RD, self.b_RO

    @property
    def grads(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.grad_a_RD, self.grad_b_RO

    @property
    def scales(self) -> tuple[float, float]:
        """The scale without and with dropout."""
        return self.scaling, self.scaling / (1.0 - self.dropout)

    @property
    def places(self) -> tuple[int, ...]:
        """The addresses of A, B and their gradients, and the rank."""
        return *(x.data_ptr() for x in (*self.weights, *self.grads)), self.rank


@dataclass
class Layer:
    """One layer's adapters of all slots. ``rank`` is the largest. For kernels, ``table_S5`` int64 holds
    their places and ``scales_S2`` float32 their scales; the last row is the bare base's, which like that of
    a slot without an adapter is zero."""

    index: int
    table_S5: torch.Tensor
    scales_S2: torch.Tensor
    adapters: dict[int | None, SlotAdapter] = field(default_factory=dict)
    rank: int = 0
    is_aligned: bool = False  # all places are multiples of 16 bytes

    def tabulate(self) -> None:
        """Note what holds for all adapters."""
        self.rank = max((adapter.rank for adapter in self.adapters.values()), default=0)
        places = [place for adapter in self.adapters.values() for place in adapter.places[:-1]]
        self.is_aligned = all(place % 16 == 0 for place in places)


@dataclass(frozen=True)
class Dense:
    """A frozen linear layer whose weight is not packed."""

    weight_OD: torch.Tensor
    bias_O: torch.Tensor | None


class Products(NamedTuple):
    """What a layer's adapters are computed with. The first two arguments are the layer and the side of its
    adapters; a mask is applied to what is as wide as the layer."""

    narrow: Callable[[Layer, int, torch.Tensor, Plan, Mask | None], torch.Tensor]
    widen: Callable[[Layer, int, torch.Tensor, int, Plan, Mask | None], torch.Tensor]
    collect: Callable[[Layer, int, torch.Tensor, torch.Tensor, Plan, Mask | None], None]


def narrow(layer: Layer, side: int, x_TW: torch.Tensor, plan: Plan, mask: Mask | None) -> torch.Tensor:
    """Return x A' times each adapter's scale, [T, R]; beyond a slot's rank it is undefined."""
    hidden_TR = x_TW.new_empty(len(x_TW), layer.rank)
    for adapter, rows in parts_of(layer.adapters, plan):
        part = _dropped(x_TW, rows, adapter, mask)
        hidden_TR[rows, : adapter.rank] = (part @ adapter.weights[side].T).mul_(adapter.scales[plan.drops])
    return hidden_TR


def widen(
    layer: Layer, side: int, hidden_TR: torch.Tensor, width: int, plan: Plan, mask: Mask | None
) -> torch.Tensor:
    """Return hidden B', [T, W]: zero for tokens without an adapter."""
    y_TW = hidden_TR.new_zeros(len(hidden_TR), width)
    for adapter, rows in parts_of(layer.adapters, plan):
        torch.mm(hidden_TR[rows, : adapter.rank], adapter.weights[side], out=y_TW[rows])
        if mask is not None and adapter.dropout:
            mask.apply_(y_TW[rows], rows)
    return y_TW


def collect(
    layer: Layer, side: int, hidden_TR: torch.Tensor, x_TW: torch.Tensor, plan: Plan, mask: Mask | None
) -> None:
    """Add hidden' x to the gradients."""
    for adapter, rows in parts_of(layer.adapters, plan):
        part = _dropped(x_TW, rows, adapter, mask)
        adapter.grads[side].add_(hidden_TR[rows, : adapter.rank].T @ part)


def _dropped(x_TW: torch.Tensor, rows: slice, adapter: SlotAdapter, mask: Mask | None) -> torch.Tensor:
    return mask.apply(x_TW[rows], rows) if mask is not None and adapter.dropout else x_TW[rows]


PLAIN = Products(narrow, widen, collect)


class AddAdapters(torch.autograd.Function):
    """Adds dropout(x) A' B' scaling of each slot to its tokens of y, in place.

    y is the base layer's output; or None, and ``base`` gives the frozen layer. Then one node does both, which
    saves an addition of x's gradients for every layer. With ``up``, x is the gate of a gated MLP, and the
    layer's input silu(x) up is not kept but computed again: a fifth less memory a token for 1 % of the time
    (8B, all linear layers: `python -m tests.benchmarks.predict 8B`).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: torch.Tensor | None,
        x: torch.Tensor,
        up: torch.Tensor | None,
        base: Dense | None,
        _anchor: torch.Tensor,
        layer: Layer,
        plan: Plan,
        products: Products,
        width: int,
    ) -> torch.Tensor:
        wide = x if up is None else gate_functions(x).forward(x, up)
        wide_TD = wide.reshape(-1, wide.shape[-1])
        hidden_TR = products.narrow(layer, A, wide_TD, plan, _mask(plan, layer))
        y = _sum(ctx, y, wide, base, products.widen(layer, B, hidden_TR, width, plan, None))
        ctx.save_for_backward(x, up, hidden_TR)  # type: ignore[arg-type]  # masks, as large as x, are recomputed
        ctx.layer, ctx.plan, ctx.base, ctx.products = layer, plan, base, products  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, up, hidden_TR = ctx.saved_tensors  # type: ignore[attr-defined]
        layer, plan, base, products = ctx.layer, ctx.plan, ctx.base, ctx.products  # type: ignore[attr-defined]
        grad_TO = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        mask, grad_x, grad_up = _mask(plan, layer), None, None
        grad_hidden_TR = products.narrow(layer, B, grad_TO, plan, None)
        products.collect(layer, B, hidden_TR, grad_TO, plan, None)
        if any(ctx.needs_input_grad[1:3]):  # type: ignore[attr-defined]  # x, or up alone
            grad_x_TD = products.widen(layer, A, grad_hidden_TR, x.shape[-1], plan, mask)
            if base is not None:
                grad_x_TD.addmm_(grad_TO, base.weight_OD)
            grad_x = grad_x_TD.view_as(x)
        if up is not None and grad_x is not None:
            grad_x, grad_up, x = gate_functions(x).backward_again(grad_x, x, up)
        elif up is not None:
            x = gate_functions(x).forward(x, up)
        products.collect(layer, A, grad_hidden_TR, x.reshape(-1, x.shape[-1]), plan, mask)
        return grad_outputs[0] if base is None else None, grad_x, grad_up, *(None,) * 6


@dataclass(frozen=True)
class Bias:
    """One layer's trained bias of one slot, in place of the base's: views into the bank."""

    own_O: torch.Tensor
    base_O: torch.Tensor
    grad_O: torch.Tensor


class ReplaceBias(torch.autograd.Function):
    """Puts each slot's own bias in place of the base's, which its tokens of y have."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, y: torch.Tensor, biases: Mapping[int | None, Bias], plan: Plan
    ) -> torch.Tensor:
        y = y.clone()
        y_TO = y.view(-1, y.shape[-1])
        for bias, rows in parts_of(biases, plan):
            y_TO[rows] += bias.own_O - bias.base_O
        ctx.biases, ctx.plan = biases, plan  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_TO = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        for bias, rows in parts_of(ctx.biases, ctx.plan):  # type: ignore[attr-defined]
            bias.grad_O.add_(grad_TO[rows].sum(0, dtype=bias.grad_O.dtype))
        return grad_outputs[0], None, None


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


def _mask(plan: Plan, layer: Layer) -> Mask | None:
    if plan.key_T is None or plan.threshold_T is None:
        return None
    return Mask(plan.key_T, plan.threshold_T, layer.index)


def parts_of(by_slot: Mapping[int | None, T], plan: Plan) -> Iterator[tuple[T, slice]]:
    """Yield what a slot has, with its tokens, for the slots of the plan that have something."""
    for slot, start, end in zip(plan.slots, plan.bounds, plan.bounds[1:], strict=False):
        if slot in by_slot:
            yield by_slot[slot], slice(start, end)
