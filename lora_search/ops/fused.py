"""RMSNorm, rotary embedding and gated MLP as one autograd node each, put into a loaded model.

transformers runs each as 6 to 10 elementwise operations, and autograd runs as many again. A module is
replaced only if a probe reproduces its own numbers. Without the norm a pass keeps 1.17x the memory for the
backward pass, without the MLP 1.23x; each of the three saves 1 to 3 % of the time on a CPU in bfloat16
(`python -m tests.benchmarks.ops`). Rotary saves no memory and stays for CUDA: by count 444 -> 438 ms of a
pass and 1.3k kernels fewer (`python -m tests.benchmarks.predict 8B`).
"""

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from lora_search.ops.compiled import compiled

PROBE_ROWS = 3
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}
Pair = tuple[torch.Tensor, torch.Tensor]
Function = Callable[..., Any]


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last axis, in float32 inside (arXiv 1910.07467). The weight is frozen.

    980 x 576 in bfloat16 on one core take 0.27 ms; F.rms_norm plus the rms for the backward pass, which it
    does not keep on a CPU, take 0.44. Mixed dtypes would take 5 times as long: hence the conversions."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = _wide(x.dtype)
        x_wide = x.to(wide)
        square_norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_()
        inverse_rms = square_norm.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        y: torch.Tensor = (x_wide * inverse_rms).mul_(weight.to(wide)).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse_rms = ctx.saved_tensors  # type: ignore[attr-defined]
        wide = inverse_rms.dtype
        grad, x_wide = grad_outputs[0].to(wide) * weight.to(wide), x.to(wide)
        projection = torch.linalg.vecdot(grad, x_wide).unsqueeze_(-1).mul_(inverse_rms.square())
        grad.addcmul_(x_wide, projection, value=-1.0 / x.shape[-1]).mul_(inverse_rms)
        return grad.to(x.dtype), None, None


class Rotary(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin (arXiv 2104.09864), in the layout of the first and second half."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        y: torch.Tensor = _rotary_functions(x)[0](x, cos, sin)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return _rotary_functions(grad_outputs[0])[1](grad_outputs[0], cos, sin), None, None


def _rotary_functions(x: torch.Tensor) -> tuple[Function, Function]:
    """Return the rotation and its gradient; on CUDA as one kernel each, instead of three."""
    return compiled_rotary(x.device, x.dtype) if x.is_cuda else (rotated, rotated_backward)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = sin.shape[-1] // 2
    return _rotate(x, cos, sin[..., :half], sin[..., half:], -1.0)


def rotated_backward(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = sin.shape[-1] // 2
    return _rotate(grad, cos, sin[..., half:], sin[..., :half], 1.0)


@cache
def compiled_rotary(device: torch.device, dtype: torch.dtype) -> tuple[Function, Function]:
    """Return both compiled for tensors of that dtype, where that gives the same numbers but for rounding."""
    x = torch.randn(1, 3, 30, 32, device=device).to(dtype)
    cos, sin = torch.randn(2, 1, 1, 30, 32, device=device).to(dtype)
    close = partial(torch.allclose, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    forward, backward = (
        compiled("rotary embeddings", function, (x, cos, sin), function(x, cos, sin), close) or function
        for function in (rotated, rotated_backward)
    )
    return forward, backward


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin_1: torch.Tensor, sin_2: torch.Tensor, sign: float
) -> torch.Tensor:
    """Return x * cos with sign * x_2 * sin_1 added to the first half, -sign * x_1 * sin_2 to the second."""
    y, half = x * cos, x.shape[-1] // 2
    y[..., :half].addcmul_(x[..., half:], sin_1, value=sign)
    y[..., half:].addcmul_(x[..., :half], sin_2, value=-sign)
    return y


class GatedSilu(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202); keeps two tensors for the backward pass, autograd keeps three."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return gate_functions(gate).forward(gate, up)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: torch.Tensor) -> Pair:
        gate, up = ctx.saved_tensors  # type: ignore[attr-defined]
        return gate_functions(gate).backward(grad_outputs[0], gate, up)


class Gate(NamedTuple):
    """silu(gate) * up; its gradients; both gradients and, again, the product."""

    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Pair]
    backward_again: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).mul_(up)


def gated_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Pair:
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def gated_again(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    opened = F.silu(gate)
    return torch.ops.aten.silu_backward(grad * up, gate), opened * grad, opened * up


PLAIN_GATE = Gate(gated, gated_backward, gated_again)


def gate_functions(x: torch.Tensor) -> Gate:
    """Return the plain functions; on CUDA as one kernel each, instead of two, four and five."""
    return compiled_gate(x.device, x.dtype) if x.is_cuda else PLAIN_GATE


@cache
def compiled_gate(device: torch.device, dtype: torch.dtype) -> Gate:
    """Return them compiled for tensors of that dtype, where that gives the same numbers but for rounding:
    inside a kernel nothing is rounded to the dtype."""
    grad, gate, up = torch.randn(3, 1, 30, 96, device=device).to(dtype)
    close = partial(torch.allclose, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])

    def fast(name: str, function: Function, *probe: torch.Tensor) -> Function:
        def agree(found: Any, wanted: Any) -> bool:
            return all(map(close, found, wanted))

        return compiled(name, function, probe, function(*probe), agree) or function

    gradients = (fast("gradients of gated MLPs", f, grad, gate, up) for f in (gated_backward, gated_again))
    return Gate(fast("gated MLPs", gated, gate, up), *gradients)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> Pair:
    """Return both rotated; the signature is transformers'."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)  # type: ignore[no-untyped-call]


def fuse(model: nn.Module) -> int:
    """Replace the model's modules where possible; return how many were replaced."""
    count = 0
    for module in model.modules():
        replacement = _norm(module) or _gated_mlp(module)
        if replacement is not None:
            module.forward = replacement
            count += 1
        if type(module).__name__.endswith("Attention"):
            _fuse_rotary(sys.modules[type(module).__module__])
    return count


def _norm(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    """Return a faster forward for an RMSNorm, including Gemma's, whose weight is an offset from 1."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter):
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6))
    for scale in (weight.detach(), 1.0 + weight.detach().to(_wide(weight.dtype))):
        forward = partial(_apply_norm, weight=scale, eps=eps)
        if _same(module, forward, _probe(weight, weight.shape[0])):
            return forward
    return None


def _apply_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.is_cuda and weight.dtype == x.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)  # one kernel each way
    y: torch.Tensor = RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def _gated_mlp(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    children = dict(module.named_children())
    gate = children.get("gate_proj")
    if not {"up_proj", "down_proj"} <= children.keys() or not isinstance(gate, nn.Module):
        return None
    weight, width = getattr(gate, "weight", None), getattr(gate, "in_features", None)
    if weight is None or width is None:
        return None
    forward = partial(_apply_gated_mlp, module)
    return forward if _same(module, forward, _probe(weight, width)) else None


def _apply_gated_mlp(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), cast(Any, mlp.down_proj)  # type: ignore[operator]
    y: torch.Tensor = down.gated(gate, up) if hasattr(down, "gated") else down(GatedSilu.apply(gate, up))  # type: ignore[no-untyped-call]
    return y


def _fuse_rotary(modeling: object) -> None:
    """Replace the function of that name in a transformers module if the results are equal."""
    original = getattr(modeling, "apply_rotary_pos_emb", None)
    if original is None or isinstance(original, partial):
        return
    if all(_same_rotary(original, dtype) for dtype in (torch.float32, torch.bfloat16)):
        modeling.apply_rotary_pos_emb = partial(_rotary_or, original)  # type: ignore[attr-defined]


def _same_rotary(original: Callable[..., Pair], dtype: torch.dtype) -> bool:
    wave = torch.sin(torch.arange(4 * PROBE_ROWS * 8.0)).view(1, 4, PROBE_ROWS, 8)
    q, cos, sin = wave[:, :2].to(dtype), wave[:, 2], wave[:, 3]
    try:
        theirs = original(q, q, cos, sin)[0]
    except (TypeError, RuntimeError):  # another signature or layout
        return False
    ours = rotary(q, q, cos, sin)[0]
    return theirs.dtype == ours.dtype and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6)


def _rotary_or(
    original: Callable[..., Pair],
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    *rest: Any,
    **named: Any,
) -> Pair:
    """Rotate whole heads with our function, partial ones (GPT-NeoX) with the model's."""
    is_whole = cos.shape[-1] == q.shape[-1]
    return rotary(q, k, cos, *rest, **named) if is_whole else original(q, k, cos, *rest, **named)


def _probe(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Return a few ordinary hidden states; in float32 if the layer's weights are packed (4 bit)."""
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    wave = torch.arange(PROBE_ROWS * width, device=weight.device).view(PROBE_ROWS, width)
    return torch.sin(wave.float()).to(dtype)


@torch.no_grad()
def _same(module: nn.Module, forward: Callable[..., torch.Tensor], x: torch.Tensor) -> bool:
    tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-5
    return torch.allclose(module(x), forward(x), rtol=tolerance, atol=tolerance)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
