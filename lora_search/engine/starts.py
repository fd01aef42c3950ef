"""PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) over a base that all slots share.

In PEFT they begin with factors of the base's weight W and take their product from it: W - s B0 A0. Here W
stays, and each slot's tokens lose s B0 A0 x: two thin matmuls more in each direction.

Legend: R rank, D input width, O output width, T tokens of a pass, K the smaller of D and O.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from lora_search.files.peft import plain_weight
from lora_search.ops.lora import Plan, parts_of
from lora_search.watching import Watch

NITER = "_niter_"  # pissa_niter_16: an approximate SVD in 16 iterations, as in PEFT


@dataclass(frozen=True)
class Start:
    """One layer's first adapter of one slot, which its output loses: views into the bank, not trained."""

    a_RD: torch.Tensor
    b_RO: torch.Tensor
    scaling: float


class Factors:
    """The factors of the layers' weights, on the host. They are computed once a layer; those of
    pissa_niter_16 depend on the rank, and only the last rank's are kept."""

    def __init__(self, bases: Sequence[nn.Linear], max_rank: int) -> None:
        self._bases, self._max_rank = bases, max_rank
        self._found: dict[tuple[int, str], tuple[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def of(self, layer: int, init: str, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return at least the first r rows of A and B, as far as the layer is that wide."""
        rank = r if NITER in init else self._max_rank
        known_rank, found = self._found.get((layer, init), (None, None))
        if found is None or known_rank != rank:
            a_RD, b_RO = factors(plain_weight(self._bases[layer]), init, rank)
            found = a_RD.cpu(), b_RO.cpu()
            self._found[layer, init] = rank, found
        return found

    def prepare(self, inits: Collection[str], watch: Watch) -> None:
        """Compute what does not depend on a trial's rank, before trials wait for it."""
        for init in inits:
            for layer in watch(
                range(len(self._bases) * (NITER not in init)), f"factors for lora.init={init}"
            ):
                self.of(layer, init, self._max_rank)


def factors(weight_OD: torch.Tensor, init: str, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [r, D] and B transposed [r, O] in float32, for a scaling of 1 in PiSSA; fewer than r rows for
    a layer that is narrower."""
    weight_OD = weight_OD.float()
    if init == "olora":
        q_OK, r_KD = torch.linalg.qr(weight_OD)
        return r_KD[:r].clone(), q_OK.T[:r].clone()  # views would keep the whole
    if NITER in init:
        u_OK, s_K, v_DK = _low_rank(weight_OD, min(r, *weight_OD.shape), int(init.rpartition(NITER)[2]))
        v_KD = v_DK.T
    else:
        u_OK, s_K, v_KD = torch.linalg.svd(weight_OD, full_matrices=False)
    root_R1 = s_K[:r].sqrt()[:, None]
    return root_R1 * v_KD[:r], root_R1 * u_OK.T[:r]


def _low_rank(
    weight_OD: torch.Tensor, rank: int, niter: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the approximate SVD; its random beginning is the same for every trial."""
    devices = [weight_OD.device] if weight_OD.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        u_OK, s_K, v_DK = torch.svd_lowrank(weight_OD, rank, niter)
    return u_OK, s_K, v_DK


class Subtract(torch.autograd.Function):
    """Takes s B0 A0 x of each slot from its tokens of y; x is before dropout."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, y: torch.Tensor, x: torch.Tensor, starts: Mapping[int | None, Start], plan: Plan
    ) -> torch.Tensor:
        y = y.clone()  # with a bias it may be a view
        y_TO, x_TD = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        for start, rows in parts_of(starts, plan):
            y_TO[rows].addmm_(x_TD[rows] @ start.a_RD.T, start.b_RO, alpha=-start.scaling)
        ctx.shape, ctx.starts, ctx.plan = x.shape, starts, plan  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(
        ctx: FunctionCtx, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            return grad_outputs[0], None, None, None
        grad_TO = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        shape: torch.Size = ctx.shape  # type: ignore[attr-defined]
        grad_x = grad_TO.new_zeros(shape)
        grad_x_TD = grad_x.view(-1, shape[-1])
        for start, rows in parts_of(ctx.starts, ctx.plan):  # type: ignore[attr-defined]
            through_TR = (grad_TO[rows] @ start.b_RO.T).mul_(-start.scaling)
            torch.mm(through_TR, start.a_RD, out=grad_x_TD[rows])
        return grad_outputs[0], grad_x, None, None
