"""DoRA (arXiv 2402.09353) over the LoRA part of a layer, with the numbers of PEFT.

y = W x + b + s B A x', where x' is x after dropout, becomes y + (g - 1) (W x' + s B A x') with the gain
g = m / ||W + s B A|| of each output row. The norm is a constant to autograd (section 4.3 of the paper) and is
computed once in an optimizer step. W x' costs a matmul of its own only where dropout is on.

Legend: D input width, O output width, T tokens of a pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from lora_search.ops.dropout import Mask
from lora_search.ops.lora import Plan, parts_of


@dataclass(frozen=True)
class Magnitude:
    """One layer's magnitudes of one slot: views into the bank, float32. ``norm_O`` and ``gain_O`` follow them
    by `renew`."""

    m_O: torch.Tensor
    grad_O: torch.Tensor
    norm_O: torch.Tensor
    gain_O: torch.Tensor
    dropout: float

    def renew(self, weight_OD: torch.Tensor, update_OD: torch.Tensor) -> None:
        """Compute norm and gain for the current weights: W, and s B A in float32."""
        torch.linalg.vector_norm(weight_OD.float() + update_OD, dim=1, out=self.norm_O)
        torch.div(self.m_O, self.norm_O, out=self.gain_O)


class Rescale(torch.autograd.Function):
    """Turns each slot's LoRA output y into DoRA's. ``weight`` returns W [O, D], unpacked."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: torch.Tensor,
        x: torch.Tensor,
        weight: Callable[[], torch.Tensor],
        bias_O: torch.Tensor | None,
        magnitudes: Mapping[int | None, Magnitude],
        plan: Plan,
        layer: int,
    ) -> torch.Tensor:
        y = y.clone()
        y_TO, x_TD = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        turned = []
        for magnitude, rows in parts_of(magnitudes, plan):
            turned_TO = y_TO[rows].clone() if bias_O is None else y_TO[rows] - bias_O
            if (mask := _mask(magnitude, plan, layer)) is not None:
                turned_TO += F.linear(_less_kept(mask, rows, x_TD[rows], magnitude), weight())
            y_TO[rows] += turned_TO * (magnitude.gain_O - 1.0).to(y.dtype)
            turned.append(turned_TO)
        ctx.save_for_backward(*turned)
        ctx.like_x, ctx.weight, ctx.rest = x_TD[:0], weight, (magnitudes, plan, layer)  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(
        ctx: FunctionCtx, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None, None, None]:
        magnitudes, plan, layer = ctx.rest  # type: ignore[attr-defined]
        like_x: torch.Tensor = ctx.like_x  # type: ignore[attr-defined]
        grad_y = grad_outputs[0].clone()
        grad_TO = grad_y.view(-1, grad_y.shape[-1])
        grad_x_TD = None
        parts = parts_of(magnitudes, plan)
        for (magnitude, rows), turned_TO in zip(parts, ctx.saved_tensors, strict=True):  # type: ignore[attr-defined]
            part = grad_TO[rows]
            magnitude.grad_O.add_((part.float() * turned_TO.float()).sum(0) / magnitude.norm_O)
            gain_O = magnitude.gain_O.to(part.dtype)
            mask = _mask(magnitude, plan, layer)
            if mask is not None and ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
                if grad_x_TD is None:
                    grad_x_TD = grad_TO.new_zeros(len(grad_TO), like_x.shape[1])
                through_TD = (part * (gain_O - 1.0)) @ ctx.weight()  # type: ignore[attr-defined]
                grad_x_TD[rows] = _less_kept(mask, rows, through_TD, magnitude)
            part *= gain_O
        grad_x = None if grad_x_TD is None else grad_x_TD.view(*grad_y.shape[:-1], -1)
        return grad_y, grad_x, None, None, None, None, None


def _less_kept(mask: Mask, rows: slice, x_TD: torch.Tensor, magnitude: Magnitude) -> torch.Tensor:
    """Return what dropout adds to x: x' - x."""
    return mask.apply(x_TD, rows) / (1.0 - magnitude.dropout) - x_TD


def _mask(magnitude: Magnitude, plan: Plan, layer: int) -> Mask | None:
    if plan.key_T is None or plan.threshold_T is None or not magnitude.dropout:
        return None
    return Mask(plan.key_T, plan.threshold_T, layer)
