"""The slot bank: the adapters of all slots over one frozen base, converted to and from PEFT's names.

Legend: S slots, P parameters of one slot, R rank, D input width, O output width, T tokens of a pass.
A slot's adapters are one flat row of theta_SP: A [R, D] of every layer, then B transposed [R, O] of every
layer, sized for the largest rank, then magnitudes [O] if a trial may have DoRA; entries not in use are zero.
Optimizer and checkpoint work on rows, the layers on views into them, in the dtype of the base.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import nn

from lora_search.files.peft import lora_rank, lora_scaling, plain_weight
from lora_search.ops.dora import Magnitude, Rescale
from lora_search.ops.lora import AddAdapters, AddGrouped, Dense, LayerBank, Plan, SlotAdapter
from lora_search.trial import TrialSettings

MAGNITUDE = "lora_magnitude_vector"
ALIGNED = 8  # grouped matmuls in bfloat16 take widths in multiples of 16 bytes


def fits_grouped(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> bool:
    """Return whether PyTorch has a grouped kernel for the device: bfloat16 on capability 9.x and 10.x.

    Elsewhere it loops over the groups and waits for their bounds at every call (GroupedBlas.cpp of 2.11 to
    2.13): `AddAdapters` loops without waiting.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip:
        return False  # a capability of 9 is an MI200 or MI300 under ROCm
    is_aligned = all(width % ALIGNED == 0 for shape in shapes for width in shape)
    return is_aligned and torch.cuda.get_device_capability(device)[0] in (9, 10)


class SlotLinear(nn.Module):
    """A frozen linear layer plus the adapters of the slots that have tokens in the pass."""

    def __init__(self, base: nn.Linear, bank: "SlotBank", layer: int) -> None:
        super().__init__()
        self.base, self.layer = base, layer
        self._bank = [bank]  # in a list, so that the bank is not a submodule
        self._dense = Dense(base.weight, base.bias) if type(base) is nn.Linear else None  # not packed (4 bit)

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight: Mamba reads it, and `fused`, so a gated MLP with adapters is fused too."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bank = self._bank[0]
        adapters = bank.adapters[self.layer]
        if bank.plan is None or adapters.keys().isdisjoint(bank.plan.slots):
            return cast(torch.Tensor, self.base(x))
        y = self.base(x) if self._dense is None else None
        if bank.is_grouped:
            added = AddGrouped.apply(
                y, x, self._dense, bank.anchor, bank.stacked[self.layer], bank.plan, self.layer
            )  # type: ignore[no-untyped-call]
        else:
            added = AddAdapters.apply(y, x, self._dense, bank.anchor, adapters, bank.plan, self.layer)  # type: ignore[no-untyped-call]
        magnitudes = bank.magnitudes[self.layer]
        if not magnitudes.keys().isdisjoint(bank.plan.slots):
            weight = partial(plain_weight, self.base)
            added = Rescale.apply(added, x, weight, self.base.bias, magnitudes, bank.plan, self.layer)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, added)


class SlotBank:
    """Holds theta_SP and its gradient, and puts the adapters into the model's layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype = torch.float32,
        is_grouped: bool | None = None,
        has_magnitudes: bool = False,
    ) -> None:
        self.names, self._bases = list(layers), list(layers.values())
        self.shapes = [(layer.in_features, layer.out_features) for layer in layers.values()]
        device = next(iter(layers.values())).weight.device
        self.is_grouped = fits_grouped(device, dtype, self.shapes) if is_grouped is None else is_grouped
        self.max_rank = -(-max_rank // ALIGNED) * ALIGNED if self.is_grouped else max_rank
        max_rank = self.max_rank
        self.start_of_b = max_rank * sum(d_in for d_in, _ in self.shapes)
        self._start_of_m = self.start_of_b + max_rank * sum(d_out for _, d_out in self.shapes)
        num_parameters = self._start_of_m + has_magnitudes * sum(d_out for _, d_out in self.shapes)
        self.theta_SP = torch.zeros(num_slots, num_parameters, device=device)
        self.grad_SP = torch.zeros_like(self.theta_SP)
        self.used_SP = self.theta_SP.to(dtype)  # the matmuls' copy; in float32 it is theta itself
        self.anchor = torch.zeros(0, device=device, requires_grad=True)
        self.adapters: list[dict[int | None, SlotAdapter]] = [{} for _ in self.names]
        self.magnitudes: list[dict[int | None, Magnitude]] = [{} for _ in self.names]
        self.stacked = [LayerBank(*views) for views in self._stacked_views()] if self.is_grouped else []
        self.plan: Plan | None = None
        for index, (name, layer) in enumerate(layers.items()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SlotLinear(layer, self, index))

    def scalings(self, slot: int | None) -> tuple[float, ...]:
        """Return the scale of the slot's adapter on each layer while dropout is off; 0 where it has none."""
        return tuple(adapters[slot].scaling if slot in adapters else 0.0 for adapters in self.adapters)

    def remove(self, model: nn.Module) -> None:
        """Restore the model's own layers."""
        for name in self.names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, model.get_submodule(name).base)

    def views(
        self, row_P: torch.Tensor, settings: TrialSettings, names: Sequence[str]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (layer index, A [r, D], B transposed [r, O]) as views into one slot's row."""
        for index, (places, (d_in, d_out)) in enumerate(zip(self._places(), self.shapes, strict=True)):
            if self.names[index] in names:
                r = lora_rank(settings, self.names[index])
                yield index, row_P[places[0]].view(-1, d_in)[:r], row_P[places[1]].view(-1, d_out)[:r]

    def _magnitudes(
        self, row_P: torch.Tensor, settings: TrialSettings, names: Sequence[str]
    ) -> dict[int, torch.Tensor]:
        """Return layer index -> magnitudes [O], as views into one slot's row; none without DoRA."""
        if not settings.use_dora:
            return {}
        parts = row_P[self._start_of_m :].split([d_out for _, d_out in self.shapes])
        return {index: part for index, part in enumerate(parts) if self.names[index] in names}

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """Yield where A and B of each layer are in a row."""
        a, b = 0, self.start_of_b
        for d_in, d_out in self.shapes:
            yield slice(a, a + self.max_rank * d_in), slice(b, b + self.max_rank * d_out)
            a, b = a + self.max_rank * d_in, b + self.max_rank * d_out

    def _stacked_views(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield A [S, R, D], B transposed [S, R, O] and their gradients, layer by layer."""
        for places, widths in zip(self._places(), self.shapes, strict=True):
            yield tuple(
                bank_SP[:, place].unflatten(1, (self.max_rank, width))
                for bank_SP in (self.used_SP, self.grad_SP)
                for place, width in zip(places, widths, strict=True)
            )

    def admit(self, slot: int, settings: TrialSettings, names: Sequence[str], seed: int) -> None:
        """Give the slot fresh adapters on the named layers: A as PEFT draws it (Kaiming uniform with a =
        sqrt 5, or Gaussian), B zero."""
        self.release(slot)
        generator = torch.Generator().manual_seed(seed)
        banks = (self.theta_SP, self.used_SP, self.grad_SP)
        views = (self.views(bank[slot], settings, names) for bank in banks)
        for (index, a_RD, _), (_, *used), (_, *grads) in zip(*views, strict=True):
            fresh, bound = torch.empty(a_RD.shape), 1.0 / math.sqrt(a_RD.shape[1])
            if settings.init == "gaussian":
                a_RD.copy_(fresh.normal_(0.0, 1.0 / len(a_RD), generator=generator))
            else:
                a_RD.copy_(fresh.uniform_(-bound, bound, generator=generator))
            scaling = lora_scaling(settings, self.names[index])
            pair = (used[0], used[1], grads[0], grads[1])
            self.adapters[index][slot] = SlotAdapter(*pair, scaling, settings.dropout)
        for index, m_O in self._magnitudes(self.theta_SP[slot], settings, names).items():
            grad_O = self._magnitudes(self.grad_SP[slot], settings, names)[index]
            parts = m_O, grad_O, torch.empty_like(m_O), torch.empty_like(m_O)
            self.magnitudes[index][slot] = Magnitude(*parts, settings.dropout)
        self.refresh(slot)
        for magnitudes in self.magnitudes:
            if slot in magnitudes:  # as B is zero: W's own norms, and gains of 1
                magnitudes[slot].m_O.copy_(magnitudes[slot].norm_O)
                magnitudes[slot].gain_O.fill_(1.0)

    def refresh(self, slot: int) -> None:
        """Copy the slot's changed row of theta to where the matmuls read it; renew DoRA's norms."""
        if self.used_SP is not self.theta_SP:
            self.used_SP[slot].copy_(self.theta_SP[slot])
        for base, adapters, magnitudes in zip(self._bases, self.adapters, self.magnitudes, strict=True):
            if slot in magnitudes:
                used = adapters[slot]
                update_OD = used.b_RO.float().T @ used.a_RD.float()
                magnitudes[slot].renew(plain_weight(base), update_OD.mul_(used.scaling))

    def release(self, slot: int) -> None:
        """Empty the slot."""
        for bank_SP in (self.theta_SP, self.used_SP, self.grad_SP):
            bank_SP[slot].zero_()
        for adapters, magnitudes in zip(self.adapters, self.magnitudes, strict=True):
            adapters.pop(slot, None)
            magnitudes.pop(slot, None)

    def tensors(
        self, row_P: torch.Tensor, settings: TrialSettings, names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Return a row's used part as PEFT names it: ``<layer>.lora_A.weight`` [r, D],
        ``<layer>.lora_B.weight`` [O, r], and with DoRA ``<layer>.lora_magnitude_vector`` [O]."""
        state = {}
        for index, a_RD, b_RO in self.views(row_P, settings, names):
            state[f"{self.names[index]}.lora_A.weight"] = a_RD.detach().cpu().contiguous()
            state[f"{self.names[index]}.lora_B.weight"] = b_RO.detach().T.cpu().contiguous()
        for index, m_O in self._magnitudes(row_P, settings, names).items():
            state[f"{self.names[index]}.{MAGNITUDE}"] = m_O.detach().cpu()
        return state

    @torch.no_grad()
    def load(
        self,
        row_P: torch.Tensor,
        settings: TrialSettings,
        names: Sequence[str],
        state: Mapping[str, torch.Tensor],
    ) -> None:
        """Load what `tensors` returned."""
        for index, a_RD, b_RO in self.views(row_P, settings, names):
            a_RD.copy_(state[f"{self.names[index]}.lora_A.weight"])
            b_RO.copy_(state[f"{self.names[index]}.lora_B.weight"].T)
        for index, m_O in self._magnitudes(row_P, settings, names).items():
            m_O.copy_(state[f"{self.names[index]}.{MAGNITUDE}"])
