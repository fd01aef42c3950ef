"""The slot bank: the adapters of all slots over one frozen base, and their way to and from PEFT's format.

Legend: S slots, P parameters of one slot, R rank, D input width, O output width, T tokens of a pass.
A slot's adapters lie in one flat row of theta_SP, per layer A [R, D] then B transposed [R, O], sized for
the largest rank; what a trial does not use stays zero. Optimizer and checkpoint see rows, the layers see
views into them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lora_search.dropout import dropped
from lora_search.trial import TrialSettings


@dataclass(frozen=True)
class Segment:
    """The tokens of one slot in a pass; slot None is the bare base. ``key_T`` is None where nothing is
    dropped."""

    slot: int | None
    num_tokens: int
    key_T: torch.Tensor | None


@dataclass(frozen=True)
class SlotAdapter:
    """One layer's adapter of one slot: leaves whose storage and gradient are views into the bank."""

    a_RD: torch.Tensor
    b_RO: torch.Tensor
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
        segments = self._bank[0].segments
        adapters = self._bank[0].adapters[self.layer]
        if not any(segment.slot in adapters for segment in segments):
            return y
        pieces = x.reshape(-1, x.shape[-1]).split([segment.num_tokens for segment in segments])
        deltas = [
            _delta(piece, adapters[segment.slot], segment.key_T, self.layer)
            if segment.slot in adapters
            else piece.new_zeros(segment.num_tokens, y.shape[-1])
            for piece, segment in zip(pieces, segments, strict=True)
        ]
        return y + torch.cat(deltas).view_as(y)


def _delta(x_TD: torch.Tensor, adapter: SlotAdapter, key_T: torch.Tensor | None, layer: int) -> torch.Tensor:
    scaling = adapter.scaling
    if key_T is not None and adapter.dropout > 0:
        x_TD = x_TD.masked_fill(dropped(key_T, layer, x_TD.shape[1], adapter.dropout), 0.0)
        scaling = scaling / (1.0 - adapter.dropout)
    hidden_TR = F.linear(x_TD, adapter.a_RD.to(x_TD.dtype))
    return (hidden_TR * scaling) @ adapter.b_RO.to(x_TD.dtype)


class SlotBank:
    """Holds theta_SP and its gradient, and puts the adapters into the model's layers."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Linear], num_slots: int, max_rank: int
    ) -> None:
        self.names = list(layers)
        self.shapes = [(layer.in_features, layer.out_features) for layer in layers.values()]
        self.max_rank = max_rank
        device = next(iter(layers.values())).weight.device
        num_parameters = max_rank * sum(d_in + d_out for d_in, d_out in self.shapes)
        self.theta_SP = torch.zeros(num_slots, num_parameters, device=device)
        self.grad_SP = torch.zeros_like(self.theta_SP)
        self.adapters: list[dict[int | None, SlotAdapter]] = [{} for _ in self.names]
        self.segments: Sequence[Segment] = ()
        for index, (name, layer) in enumerate(layers.items()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SlotLinear(layer, self, index))

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
        chosen = frozenset(names)
        values = self.views(self.theta_SP[slot], settings.r, tuple(chosen))
        grads = self.views(self.grad_SP[slot], settings.r, tuple(chosen))
        for (index, a_RD, b_RO), (_, grad_a_RD, grad_b_RO) in zip(values, grads, strict=True):
            bound = 1.0 / math.sqrt(a_RD.shape[1])
            a_RD.copy_(torch.empty(a_RD.shape).uniform_(-bound, bound, generator=generator))
            leaf_a, leaf_b = a_RD.detach().requires_grad_(), b_RO.detach().requires_grad_()
            leaf_a.grad, leaf_b.grad = grad_a_RD, grad_b_RO
            self.adapters[index][slot] = SlotAdapter(leaf_a, leaf_b, lora_scaling(settings), settings.dropout)

    def release(self, slot: int) -> None:
        """Empty the slot."""
        self.theta_SP[slot].zero_()
        self.grad_SP[slot].zero_()
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
) -> None:
    """Write a folder that plain ``PeftModel.from_pretrained`` loads."""
    folder.mkdir(parents=True, exist_ok=True)
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
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
    )
