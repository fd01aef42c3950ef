"""The slot bank: the adapters of all slots over one frozen base, converted to and from PEFT's names.

Legend: S slots, P parameters of one slot, R rank, D input width, O output width, T tokens of a pass.
A slot's adapters are one flat row of theta_SP: A [R, D] of every layer, then B transposed [R, O] of every
layer, sized for the largest rank, then magnitudes [O] if a trial may have DoRA; entries not in use are zero.
Optimizer and checkpoint work on rows, the layers on views into them, in the dtype of the base.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn

from lora_search.files.peft import lora_rank, lora_scaling, plain_weight
from lora_search.ops.dora import Magnitude, Rescale
from lora_search.ops.fused import GatedSilu
from lora_search.ops.lora import PLAIN, TILE, AddAdapters, Dense, Layer, Plan, Products, SlotAdapter
from lora_search.ops.products import products_for, tiles
from lora_search.trial import TrialSettings

MAGNITUDE = "lora_magnitude_vector"


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
        if not self._has_any(bank.adapters):
            return cast(torch.Tensor, self.base(x))
        added = self._add(self.base(x) if self._dense is None else None, x, None)
        if self._has_any(bank.magnitudes):
            weight, magnitudes = partial(plain_weight, self.base), bank.magnitudes[self.layer]
            added = Rescale.apply(added, x, weight, self.base.bias, magnitudes, bank.plan, self.layer)  # type: ignore[no-untyped-call]
        return added

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for silu(gate) * up, which is not kept where only adapters need it."""
        bank = self._bank[0]
        if self._dense is None or not self._has_any(bank.adapters) or self._has_any(bank.magnitudes):
            return self(GatedSilu.apply(gate, up))  # type: ignore[no-any-return, no-untyped-call]
        return self._add(None, gate, up)

    def _add(self, y: torch.Tensor | None, x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        bank, width = self._bank[0], self.base.out_features
        layer = bank.layers[self.layer]
        added = AddAdapters.apply(y, x, up, self._dense, bank.anchor, layer, bank.plan, bank.products, width)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, added)

    def _has_any(self, by_layer: Sequence[Mapping[int | None, object]]) -> bool:
        """Return whether a slot with tokens in the pass has something on this layer."""
        plan = self._bank[0].plan
        return plan is not None and not by_layer[self.layer].keys().isdisjoint(plan.slots)


class SlotBank:
    """Holds theta_SP and its gradient, and puts the adapters into the model's layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype = torch.float32,
        products: Products | None = None,
        has_magnitudes: bool = False,
    ) -> None:
        self.names, self._bases = list(layers), list(layers.values())
        self.shapes = [(layer.in_features, layer.out_features) for layer in layers.values()]
        device = next(iter(layers.values())).weight.device
        self.products = products or products_for(device, dtype)
        self.max_rank = max_rank
        self.start_of_b = max_rank * sum(d_in for d_in, _ in self.shapes)
        self._start_of_m = self.start_of_b + max_rank * sum(d_out for _, d_out in self.shapes)
        num_parameters = self._start_of_m + has_magnitudes * sum(d_out for _, d_out in self.shapes)
        self.theta_SP = torch.zeros(num_slots, num_parameters, device=device)
        self.grad_SP = torch.zeros_like(self.theta_SP)
        self.used_SP = self.theta_SP.to(dtype)  # the matmuls' copy; in float32 it is theta itself
        self.anchor = torch.zeros(0, device=device, requires_grad=True)
        self._table_LS5 = torch.zeros(len(layers), num_slots + 1, 5, dtype=torch.int64, device=device)
        self._scales_LS2 = torch.zeros(len(layers), num_slots + 1, 2, device=device)
        parts = zip(self._table_LS5, self._scales_LS2, strict=True)
        self.layers = [Layer(index, *tables) for index, tables in enumerate(parts)]
        self.adapters = [layer.adapters for layer in self.layers]
        self.magnitudes: list[dict[int | None, Magnitude]] = [{} for _ in self.names]
        self.plan: Plan | None = None
        for index, (name, layer) in enumerate(layers.items()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SlotLinear(layer, self, index))

    def set_plan(self, plan: Plan, upload: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Assign the tokens of the next passes to slots."""
        if self.products is not PLAIN:
            rows = {slot: len(self.theta_SP) if slot is None else slot for slot in plan.slots}
            parts_P3, tiles_N3 = (upload(tiles(rows, plan, size)) for size in (None, TILE))
            plan = replace(plan, parts_P3=parts_P3, tiles_N3=tiles_N3)
        self.plan = plan

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
        self._tabulate(slot)
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
        self._tabulate(slot)

    def _tabulate(self, slot: int) -> None:
        """Tell the kernels where the slot's adapters are; layers where it has none have zeros."""
        found = [adapters.get(slot) for adapters in self.adapters]
        places = [(0,) * 5 if adapter is None else adapter.places for adapter in found]
        scales = [(0.0, 0.0) if adapter is None else adapter.scales for adapter in found]
        self._table_LS5[:, slot].copy_(torch.tensor(places))
        self._scales_LS2[:, slot].copy_(torch.tensor(scales))
        for layer in self.layers:
            layer.tabulate()

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
