"""The LM head on completion tokens only: NLL, with its gradient in the forward pass; no logits are kept.

Legend: N completion tokens, D width, V vocabulary. All chunks share one buffer for logits:
a new one per chunk costs a fifth of the time on a CPU (51 instead of 40 ms, 256 tokens in float32). With
F.cross_entropy on all logits a pass takes 1.1x the time in bfloat16 and keeps 1.28x the memory for the
backward pass (`python -m tests.benchmarks.ops`); torch 2.13's linear_cross_entropy cannot cap logits. On CUDA
two compiled kernels make NLL and gradient of a chunk, where nothing caps, scales or smooths its logits: by
count 22 -> 12 ms of a pass of 8k tokens (`python -m tests.benchmarks.predict`).
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import repeat

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from lora_search.ops.compiled import compiled
from lora_search.ops.tokens import Parts, Whole, within

CPU_ROWS = (256, 16)  # rows in one matmul, and in one softmax that stays in cache: 16 x 49k float32 are 3 MB
CUDA_ROWS = (1024, 256)  # 1024 x 128k logits in bfloat16 are 263 MB
Pair = tuple[torch.Tensor, torch.Tensor]


def nll_and_gradient(logits_NV: torch.Tensor, target_N: torch.Tensor) -> Pair:
    """Return NLL [N] in float32, and its gradient by the logits, softmax minus one-hot, in their dtype."""
    z = logits_NV.float()
    total = z.logsumexp(1, keepdim=True)
    hit = torch.arange(z.shape[1], device=z.device) == target_N[:, None]
    return (total - z.gather(1, target_N[:, None]))[:, 0], ((z - total).exp() - hit.float()).to(
        logits_NV.dtype
    )


@cache
def compiled_nll(device: torch.device, dtype: torch.dtype) -> Callable[..., Pair] | None:
    """Return `nll_and_gradient` compiled for logits of that dtype; None where that gives other numbers."""
    logits, target = 3 * torch.randn(30, 96, device=device).to(dtype), torch.arange(30, device=device) * 3
    expected = nll_and_gradient(logits, target)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    close = partial(torch.allclose, rtol=tolerance, atol=tolerance)
    return compiled(
        "the head", nll_and_gradient, (logits, target), expected,
        lambda found, wanted: all(map(close, found, wanted)),
    )  # fmt: skip


class Head:
    """The frozen output layer, with the cap that Gemma 2 puts on its logits and the scale of Granite's."""

    def __init__(self, output: nn.Linear, softcap: float | None = None, scale: float = 1.0) -> None:
        self.weight_VD, self.bias_V, self.softcap = output.weight, output.bias, softcap
        self.scale = scale
        rows, block_rows = CUDA_ROWS if output.weight.is_cuda else CPU_ROWS
        self.logits_NV = torch.empty(
            rows, len(self.weight_VD), dtype=output.weight.dtype, device=output.weight.device
        )
        self.block_NV = torch.empty(
            block_rows, len(self.weight_VD), dtype=_wide(output.weight), device=output.weight.device
        )
        is_usual = output.weight.is_cuda and softcap is None and scale == 1.0
        self.fast = compiled_nll(output.weight.device, output.weight.dtype) if is_usual else None

    def nll(
        self,
        hidden_ND: torch.Tensor,
        target_N: torch.Tensor,
        smoothing_N: torch.Tensor | None = None,
        trained: Parts = (),
        own: Whole | None = None,
    ) -> torch.Tensor:
        """Return NLL per token [N], in float32, differentiable if autograd is on. ``smoothing_N``: each
        token's label smoothing, the share of the mean over all tokens of the vocabulary. ``trained``: rows of
        the head that some slots train; ``own``: one slot's head in place of the base's."""
        nll_N: torch.Tensor = CompletionNll.apply(hidden_ND, self, target_N, smoothing_N, trained, own)  # type: ignore[no-untyped-call]
        return nll_N

    def chunk(
        self,
        hidden_ND: torch.Tensor,
        target_N: torch.Tensor,
        smoothing_N: torch.Tensor | None,
        trained: Parts,
        own: Whole | None,
        with_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """Return NLL [N], its gradient [N, D], and that of trained rows' logits [N', K], for as many rows as
        the buffer holds."""
        weight_VD = self.weight_VD if own is None else own.e_VD
        nll_N, grad_NV = self.logits_gradient(hidden_ND, target_N, smoothing_N, trained, weight_VD, with_grad)
        if not with_grad:
            return nll_N, None, []
        taken = [tokens.take(grad_NV[rows]) for tokens, rows in trained]
        grad_ND = grad_NV @ weight_VD
        for (tokens, rows), grad_NK in zip(trained, taken, strict=True):
            grad_ND[rows].addmm_(grad_NK, tokens.e_KD)
        return nll_N, grad_ND, taken

    def logits_gradient(
        self,
        hidden_ND: torch.Tensor,
        target_N: torch.Tensor,
        smoothing_N: torch.Tensor | None,
        trained: Parts,
        weight_VD: torch.Tensor,
        with_grad: bool = True,
    ) -> Pair:
        """Return NLL [N] and, in the buffer, its gradient by the logits."""
        logits_NV = torch.mm(hidden_ND, weight_VD.T, out=self.logits_NV[: len(hidden_ND)])
        if self.bias_V is not None:
            logits_NV += self.bias_V
        for tokens, rows in trained:
            tokens.set_logits(logits_NV[rows], hidden_ND[rows])
        if self.fast is not None and smoothing_N is None and with_grad:
            return self.fast(logits_NV, target_N)
        step = len(self.block_NV)
        parts = zip(logits_NV.split(step), target_N.split(step), _split(smoothing_N, step), strict=False)
        return torch.cat([self._block(*part, with_grad) for part in parts]), logits_NV

    def _block(
        self,
        logits: torch.Tensor,
        target_N: torch.Tensor,
        smoothing_N: torch.Tensor | None,
        with_grad: bool,
    ) -> torch.Tensor:
        """Return NLL [N]; with_grad turns the logits into its gradient: softmax minus one-hot."""
        z = self.block_NV[: len(logits)].copy_(logits)
        if self.scale != 1.0:
            z.mul_(self.scale)
        bent = None if self.softcap is None else (z / self.softcap).tanh_()
        if bent is not None and self.softcap is not None:
            torch.mul(bent, self.softcap, out=z)
        target = target_N[:, None]
        chosen, top = z.gather(1, target), z.amax(1, keepdim=True)
        share = None if smoothing_N is None else smoothing_N[:, None].to(z.dtype)
        if share is not None:
            chosen = chosen + share * (z.mean(1, keepdim=True) - chosen)
        total = z.sub_(top).exp_().sum(1, keepdim=True)
        if with_grad:
            hit = torch.full_like(total, -1.0) if share is None else share - 1.0
            z.div_(total).scatter_add_(1, target, hit)
            if share is not None:
                z.sub_(share / z.shape[1])
            if bent is not None:
                z.mul_(1.0 - bent.square_())
            logits.copy_(z if self.scale == 1.0 else z.mul_(self.scale))
        return (total.log() + top - chosen)[:, 0]


class CompletionNll(torch.autograd.Function):
    """NLL per token [N] from hidden states [N, D]. A token's NLL depends on its own hidden state only, so its
    gradient is computed chunk by chunk in the forward pass and scaled in the backward pass. The gradient of a
    slot's own head [V, D] needs the scaled gradients of logits, which are computed again rather than kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_ND: torch.Tensor,
        head: Head,
        target_N: torch.Tensor,
        smoothing_N: torch.Tensor | None,
        trained: Parts,
        own: Whole | None,
    ) -> torch.Tensor:
        with_grad, size = ctx.needs_input_grad[0], len(head.logits_NV)  # type: ignore[attr-defined]
        parts = zip(hidden_ND.split(size), target_N.split(size), _split(smoothing_N, size), strict=False)
        nlls, grads, taken = [], [], []
        for number, part in enumerate(parts):
            start = number * size
            mine = list(within(trained, start, start + size))
            nll_N, grad_ND, grads_NK = head.chunk(*part, mine, own, with_grad)
            nlls.append(nll_N)
            grads += [] if grad_ND is None else [grad_ND]
            for (tokens, rows), grad_NK in zip(mine, grads_NK, strict=False):
                taken.append((tokens, slice(start + rows.start, start + rows.stop), grad_NK))
        if with_grad:
            ctx.save_for_backward(torch.cat(grads), *([hidden_ND] if taken or own is not None else []))
        ctx.taken, ctx.own, ctx.rest = taken, own, (head, target_N, smoothing_N)  # type: ignore[attr-defined]
        return torch.cat(nlls)

    @staticmethod
    def backward(
        ctx: FunctionCtx, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None, None]:
        grad_ND, *hidden = ctx.saved_tensors  # type: ignore[attr-defined]
        by_N1 = grad_outputs[0][:, None].to(grad_ND.dtype)
        for tokens, rows, grad_NK in ctx.taken:  # type: ignore[attr-defined]
            tokens.grad_KD.add_((grad_NK * by_N1[rows]).T @ hidden[0][rows])
        if ctx.own is not None:  # type: ignore[attr-defined]
            _collect(ctx.own, hidden[0], by_N1, *ctx.rest)  # type: ignore[attr-defined]
        return grad_ND * by_N1, None, None, None, None, None


def _collect(
    own: Whole,
    hidden_ND: torch.Tensor,
    by_N1: torch.Tensor,
    head: Head,
    target_N: torch.Tensor,
    smoothing_N: torch.Tensor | None,
) -> None:
    """Add to the gradient of a slot's own head, chunk by chunk."""
    size = len(head.logits_NV)
    columns = (hidden_ND, target_N, by_N1)
    for smoothing, hidden, target, by in zip(
        _split(smoothing_N, size), *(x.split(size) for x in columns), strict=False
    ):
        _, grad_NV = head.logits_gradient(hidden, target, smoothing, (), own.e_VD)
        own.collect_logits(grad_NV.mul_(by), hidden)


def _split(smoothing_N: torch.Tensor | None, rows: int) -> Iterable[torch.Tensor | None]:
    return repeat(None) if smoothing_N is None else smoothing_N.split(rows)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
