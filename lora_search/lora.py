"""The slot bank: the adapters of all slots over one frozen base, and their way to and from PEFT's format.

Legend: S slots, P parameters of one slot, R rank, D input width, O output width, T tokens of a pass.
A slot's adapters lie in one flat row of theta_SP, per layer A [R, D] then B transposed [R, O], sized for
the largest rank; what a trial does not use stays zero. Optimizer and checkpoint see rows, the layers see
views into them, in the dtype of the base.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from torch import nn
from torch.autograd.function import FunctionCtx

from lora_search.dropout import kept
from lora_search.files import TEMPORARY, explained_writing, write_file
from lora_search.sealed import read_sealed, write_sealed
from lora_search.trial import TrialSettings

PEFT_PREFIX, WEIGHTS_NAME = "base_model.model.", "adapter_model.safetensors"


@dataclass(frozen=True)
class Plan:
    """Whose tokens stand where in a pass: ``slots[i]`` has tokens ``bounds[i]`` to ``bounds[i + 1]``.

    Slot None is the bare base. Keys and thresholds (see `dropout`) are None where nothing is dropped."""

    slots: tuple[int | None, ...]
    bounds: tuple[int, ...]
    key_T: torch.Tensor | None
    threshold_T: torch.Tensor | None


@dataclass(frozen=True)
class SlotAdapter:
    """One layer's adapter of one slot: views into the bank. ``scaling`` makes up for what dropout takes."""

    a_RD: torch.Tensor
    b_RO: torch.Tensor
    grad_a_RD: torch.Tensor
    grad_b_RO: torch.Tensor
    scaling: float
    dropout: float


def lora_scaling(settings: TrialSettings) -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732), as PEFT does."""
    return settings.alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)


class SlotLinear(nn.Module):
    """A frozen linear layer plus the adapters of whichever slots have tokens in the pass."""

    def __init__(self, base: nn.Linear, bank: "SlotBank", layer: int) -> None:
        super().__init__()
        self.base, self.layer = base, layer
        self._bank = [bank]  # in a list: the bank is no submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        bank = self._bank[0]
        if bank.plan is None or bank.adapters[self.layer].keys().isdisjoint(bank.plan.slots):
            return y
        adapters = bank.adapters[self.layer]
        added: torch.Tensor = AddAdapters.apply(y, x, bank.anchor, adapters, bank.plan, self.layer)  # type: ignore[no-untyped-call]
        return added


class AddAdapters(torch.autograd.Function):
    """Adds dropout(x) A' B' scaling of each slot to its tokens of y, in place.

    The gradients of A and B go straight into the bank: fewer nodes, no accumulation by autograd.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: torch.Tensor,
        x: torch.Tensor,
        _anchor: torch.Tensor,
        adapters: Mapping[int | None, SlotAdapter],
        plan: Plan,
        layer: int,
    ) -> torch.Tensor:
        x_TD, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        keep = _keep(plan, layer, x.shape[-1])
        input_TD = x_TD if keep is None else x_TD * keep
        hiddens = []
        for adapter, rows in _parts(adapters, plan):
            scaling = adapter.scaling / (1.0 - adapter.dropout) if keep is not None else adapter.scaling
            hidden_TR = (input_TD[rows] @ adapter.a_RD.T).mul_(scaling)
            y_TO[rows].addmm_(hidden_TR, adapter.b_RO)
            hiddens.append(hidden_TR)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, keep, *hiddens)  # type: ignore[arg-type]  # None is fine
        ctx.adapters, ctx.plan = adapters, plan  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(
        ctx: FunctionCtx, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None, None]:
        x, keep, *hiddens = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_TO = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        x_TD = x.reshape(-1, x.shape[-1])
        input_TD = x_TD if keep is None else x_TD * keep
        grad_x_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[1] else None  # type: ignore[attr-defined]
        parts = _parts(ctx.adapters, ctx.plan)  # type: ignore[attr-defined]
        for (adapter, rows), hidden_TR in zip(parts, hiddens, strict=True):
            scaling = adapter.scaling / (1.0 - adapter.dropout) if keep is not None else adapter.scaling
            grad_hidden_TR = (grad_TO[rows] @ adapter.b_RO.T).mul_(scaling)
            adapter.grad_b_RO.add_(hidden_TR.T @ grad_TO[rows])
            adapter.grad_a_RD.add_(grad_hidden_TR.T @ input_TD[rows])
            if grad_x_TD is not None:
                torch.mm(grad_hidden_TR, adapter.a_RD, out=grad_x_TD[rows])
        if grad_x_TD is not None and keep is not None:
            grad_x_TD.mul_(keep)
        return grad_outputs[0], None if grad_x_TD is None else grad_x_TD.view_as(x), None, None, None, None


def _keep(plan: Plan, layer: int, width: int) -> torch.Tensor | None:
    if plan.key_T is None or plan.threshold_T is None:
        return None
    return kept(plan.key_T, plan.threshold_T, layer, width)


def _parts(adapters: Mapping[int | None, SlotAdapter], plan: Plan) -> Iterator[tuple[SlotAdapter, slice]]:
    for slot, start, end in zip(plan.slots, plan.bounds, plan.bounds[1:], strict=False):
        if slot in adapters:
            yield adapters[slot], slice(start, end)


class SlotBank:
    """Holds theta_SP and its gradient, and puts the adapters into the model's layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.names = list(layers)
        self.shapes = [(layer.in_features, layer.out_features) for layer in layers.values()]
        self.max_rank = max_rank
        device = next(iter(layers.values())).weight.device
        num_parameters = max_rank * sum(d_in + d_out for d_in, d_out in self.shapes)
        self.theta_SP = torch.zeros(num_slots, num_parameters, device=device)
        self.grad_SP = torch.zeros_like(self.theta_SP)
        self.used_SP = self.theta_SP.to(dtype)  # what the matmuls see: theta itself in float32
        self.anchor = torch.zeros(0, device=device, requires_grad=True)
        self.adapters: list[dict[int | None, SlotAdapter]] = [{} for _ in self.names]
        self.plan: Plan | None = None
        for index, (name, layer) in enumerate(layers.items()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SlotLinear(layer, self, index))

    def remove(self, model: nn.Module) -> None:
        """Put the bare layers back into the model."""
        for name in self.names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, model.get_submodule(name).base)

    def views(
        self, row_P: torch.Tensor, r: int, names: Sequence[str]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (layer index, A [r, D], B transposed [r, O]) as views into one slot's row."""
        start = 0
        for index, (d_in, d_out) in enumerate(self.shapes):
            middle, end = start + self.max_rank * d_in, start + self.max_rank * (d_in + d_out)
            if self.names[index] in names:
                yield index, row_P[start:middle].view(-1, d_in)[:r], row_P[middle:end].view(-1, d_out)[:r]
            start = end

    def admit(self, slot: int, settings: TrialSettings, names: Sequence[str], seed: int) -> None:
        """Give the slot fresh adapters on the named layers: A uniform as in PEFT (Kaiming, a = sqrt 5), B
        zero."""
        self.release(slot)
        generator = torch.Generator().manual_seed(seed)
        banks = (self.theta_SP, self.used_SP, self.grad_SP)
        views = (self.views(bank[slot], settings.r, names) for bank in banks)
        for (index, a_RD, _), (_, *used), (_, *grads) in zip(*views, strict=True):
            bound = 1.0 / math.sqrt(a_RD.shape[1])
            a_RD.copy_(torch.empty(a_RD.shape).uniform_(-bound, bound, generator=generator))
            pair = (used[0], used[1], grads[0], grads[1])
            self.adapters[index][slot] = SlotAdapter(*pair, lora_scaling(settings), settings.dropout)
        self.refresh(slot)

    def refresh(self, slot: int) -> None:
        """Let the matmuls see the slot's row after theta has changed."""
        if self.used_SP is not self.theta_SP:
            self.used_SP[slot].copy_(self.theta_SP[slot])

    def release(self, slot: int) -> None:
        """Empty the slot."""
        for bank_SP in (self.theta_SP, self.used_SP, self.grad_SP):
            bank_SP[slot].zero_()
        for adapters in self.adapters:
            adapters.pop(slot, None)

    def tensors(self, row_P: torch.Tensor, r: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return a row's used part as PEFT names it: ``<layer>.lora_A.weight`` [r, D],
        ``<layer>.lora_B.weight`` [O, r]."""
        state = {}
        for index, a_RD, b_RO in self.views(row_P, r, names):
            state[f"{self.names[index]}.lora_A.weight"] = a_RD.detach().cpu().contiguous()
            state[f"{self.names[index]}.lora_B.weight"] = b_RO.detach().T.cpu().contiguous()
        return state

    @torch.no_grad()
    def load(
        self, row_P: torch.Tensor, r: int, names: Sequence[str], state: Mapping[str, torch.Tensor]
    ) -> None:
        """Put back what `tensors` gave."""
        for index, a_RD, b_RO in self.views(row_P, r, names):
            a_RD.copy_(state[f"{self.names[index]}.lora_A.weight"])
            b_RO.copy_(state[f"{self.names[index]}.lora_B.weight"].T)


def export_peft(
    state: Mapping[str, torch.Tensor],
    settings: TrialSettings,
    names: Sequence[str],
    base_path: str,
    folder: Path,
    note: Mapping[str, object] | None = None,
) -> None:
    """Write a folder that plain ``PeftModel.from_pretrained`` loads; the weights change in one go, sealed
    with the note."""
    config = PeftLoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # PEFT divides it, so a fraction is fine
        lora_dropout=settings.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
        use_rslora=settings.use_rslora,
        base_model_name_or_path=base_path,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    _write_config(config, folder)
    weights = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state.items()}
    write_sealed(folder / WEIGHTS_NAME, weights, note or {})


def read_peft(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return weights and note as `export_peft` was given them. Raises DamagedFileError."""
    weights, note = read_sealed(folder / WEIGHTS_NAME)
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in weights.items()}, note


def _write_config(config: PeftLoraConfig, folder: Path) -> None:
    """Let PEFT write beside the folder, so that a full disk leaves the old file as it was."""
    fresh = folder.with_name(f"{folder.name}{TEMPORARY}")
    with explained_writing(folder):
        config.save_pretrained(str(fresh))
        for path in fresh.iterdir():
            write_file(folder / path.name, path.read_bytes())
        shutil.rmtree(fresh)
