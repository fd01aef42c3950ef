"""The slot bank: the adapters of all slots over one frozen base, converted to and from PEFT's names.

Legend: S slots, P parameters of one slot, R rank, D input width, O output width, T tokens of a pass.
A slot's adapters are a row, with one flat part of theta_SP on each device of the base, beside its layers: A
[R, D] of every layer, then B transposed [R, O] of every layer, sized for the largest rank, then magnitudes
[O] if a trial may have DoRA; entries not in use are zero. Optimizer and checkpoint work on rows, the layers
on views into them, in the dtype of the base.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
Row = Sequence[torch.Tensor]  # one slot's parameters [P]: a part on each device


@dataclass(frozen=True)
class Place:
    """Where a layer's A, B and magnitudes are: in which part of a row, and there from where to where."""

    part: int
    a: slice
    b: slice
    m: slice


def lay_out(
    shapes: Sequence[tuple[int, int]], parts: Sequence[int], rank: int, has_magnitudes: bool
) -> tuple[list[Place], list[int], list[int]]:
    """Return each layer's place, and for each part where the matrices B begin, and its size."""
    ends = [0] * (max(parts) + 1)

    def take(part: int, count: int) -> slice:
        ends[part] += count
        return slice(ends[part] - count, ends[part])

    a = [take(part, rank * d_in) for part, (d_in, _) in zip(parts, shapes, strict=True)]
    starts_of_b = list(ends)
    b = [take(part, rank * d_out) for part, (_, d_out) in zip(parts, shapes, strict=True)]
    m = [take(part, has_magnitudes * d_out) for part, (_, d_out) in zip(parts, shapes, strict=True)]
    return list(map(Place, parts, a, b, m)), starts_of_b, ends


def row_of(parts_SP: Sequence[torch.Tensor], slot: int) -> Row:
    """Return a slot's row of parameters, gradients or moments."""
    return [part_SP[slot] for part_SP in parts_SP]


class SlotLinear(nn.Module):
    """A frozen linear layer plus the adapters of the slots that have tokens in the pass."""

    def __init__(self, base: nn.Linear, bank: "SlotBank", layer: int, part: int) -> None:
        super().__init__()
        self.base, self.layer, self.part = base, layer, part
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

    @property
    def plan(self) -> Plan | None:
        return self._bank[0].plans[self.part]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bank = self._bank[0]
        if not self._has_any(bank.adapters):
            return cast(torch.Tensor, self.base(x))
        added = self._add(self.base(x) if self._dense is None else None, x, None)
        if self._has_any(bank.magnitudes):
            weight, magnitudes = partial(plain_weight, self.base), bank.magnitudes[self.layer]
            added = Rescale.apply(added, x, weight, self.base.bias, magnitudes, self.plan, self.layer)  # type: ignore[no-untyped-call]
        return added

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for silu(gate) * up, which is not kept where only adapters need it."""
        bank = self._bank[0]
        if self._dense is None or not self._has_any(bank.adapters) or self._has_any(bank.magnitudes):
            return self(GatedSilu.apply(gate, up))  # type: ignore[no-any-return, no-untyped-call]
        return self._add(None, gate, up)

    def _add(self, y: torch.Tensor | None, x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        bank, width = self._bank[0], self.base.out_features
        layer, anchor = bank.layers[self.layer], bank.anchors[self.part]
        added = AddAdapters.apply(y, x, up, self._dense, anchor, layer, self.plan, bank.products, width)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, added)

    def _has_any(self, by_layer: Sequence[Mapping[int | None, object]]) -> bool:
        """Return whether a slot with tokens in the pass has something on this layer."""
        return self.plan is not None and not by_layer[self.layer].keys().isdisjoint(self.plan.slots)


class SlotBank:
    """Holds theta and its gradient, and puts the adapters into the model's layers."""

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
        self.devices = list(dict.fromkeys(base.weight.device for base in self._bases))
        known = {products or products_for(device, dtype) for device in self.devices}
        self.products = known.pop() if len(known) == 1 else PLAIN
        self.num_slots, self.dtype, self.max_rank = num_slots, dtype, max_rank
        parts = [self.devices.index(base.weight.device) for base in self._bases]
        self._places, self.starts_of_b, sizes = lay_out(self.shapes, parts, max_rank, has_magnitudes)
        self.theta = [torch.zeros(num_slots, n, device=d) for n, d in zip(sizes, self.devices, strict=True)]
        self.grad = [torch.zeros_like(theta_SP) for theta_SP in self.theta]
        self.used = [theta_SP.to(dtype) for theta_SP in self.theta]  # the matmuls'; in float32 theta itself
        self.anchors = [torch.zeros(0, device=device, requires_grad=True) for device in self.devices]
        self.layers = [
            Layer(
                index,
                torch.zeros(num_slots + 1, 5, dtype=torch.int64, device=base.weight.device),
                torch.zeros(num_slots + 1, 2, device=base.weight.device),
            )
            for index, base in enumerate(self._bases)
        ]
        self.adapters = [layer.adapters for layer in self.layers]
        self.magnitudes: list[dict[int | None, Magnitude]] = [{} for _ in self.names]
        self.plans: list[Plan | None] = [None for _ in self.devices]
        for index, (name, layer) in enumerate(layers.items()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SlotLinear(layer, self, index, parts[index]))

    @property
    def num_parameters(self) -> int:
        """How many parameters a slot has, on all devices."""
        return sum(theta_SP.shape[1] for theta_SP in self.theta)

    def set_plan(self, plan: Plan, upload: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Assign the tokens of the next passes to slots."""
        if self.products is not PLAIN:
            rows = {slot: self.num_slots if slot is None else slot for slot in plan.slots}
            parts_P3, tiles_N3 = (upload(tiles(rows, plan, size)) for size in (None, TILE))
            plan = replace(plan, parts_P3=parts_P3, tiles_N3=tiles_N3)
        self.plans = [plan.on(device) for device in self.devices]

    def remove(self, model: nn.Module) -> None:
        """Restore the model's own layers."""
        for name in self.names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, model.get_submodule(name).base)

    def views(
        self, row: Row, settings: TrialSettings, names: Sequence[str]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (layer index, A [r, D], B transposed [r, O]) as views into one slot's row."""
        for index, (place, (d_in, d_out)) in enumerate(zip(self._places, self.shapes, strict=True)):
            if self.names[index] in names:
                r, part_P = lora_rank(settings, self.names[index]), row[place.part]
                yield index, part_P[place.a].view(-1, d_in)[:r], part_P[place.b].view(-1, d_out)[:r]

    def _magnitudes(self, row: Row, settings: TrialSettings, names: Sequence[str]) -> dict[int, torch.Tensor]:
        """Return layer index -> magnitudes [O], as views into one slot's row; none without DoRA."""
        return {
            index: row[place.part][place.m]
            for index, place in enumerate(self._places)
            if settings.use_dora and self.names[index] in names
        }

    def admit(self, slot: int, settings: TrialSettings, names: Sequence[str], seed: int) -> None:
        """Give the slot fresh adapters on the named layers: A as PEFT draws it (Kaiming uniform with a =
        sqrt 5, or Gaussian), B zero."""
        self.release(slot)
        generator = torch.Generator().manual_seed(seed)
        views = (
            self.views(row_of(bank, slot), settings, names) for bank in (self.theta, self.used, self.grad)
        )
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
        grads_O = self._magnitudes(row_of(self.grad, slot), settings, names)
        for index, m_O in self._magnitudes(row_of(self.theta, slot), settings, names).items():
            grad_O = grads_O[index]
            parts = m_O, grad_O, torch.empty_like(m_O), torch.empty_like(m_O)
            self.magnitudes[index][slot] = Magnitude(*parts, settings.dropout)
        self.refresh(slot)
        for magnitudes in self.magnitudes:
            if slot in magnitudes:  # as B is zero: W's own norms, and gains of 1
                magnitudes[slot].m_O.copy_(magnitudes[slot].norm_O)
                magnitudes[slot].gain_O.fill_(1.0)

    def refresh(self, slot: int) -> None:
        """Copy the slot's changed row of theta to where the matmuls read it; renew DoRA's norms."""
        for used_SP, theta_SP in zip(self.used, self.theta, strict=True):
            if used_SP is not theta_SP:
                used_SP[slot].copy_(theta_SP[slot])
        for base, adapters, magnitudes in zip(self._bases, self.adapters, self.magnitudes, strict=True):
            if slot in magnitudes:
                used = adapters[slot]
                update_OD = used.b_RO.float().T @ used.a_RD.float()
                magnitudes[slot].renew(plain_weight(base), update_OD.mul_(used.scaling))

    def release(self, slot: int) -> None:
        """Empty the slot."""
        for bank_SP in (*self.theta, *self.used, *self.grad):
            bank_SP[slot].zero_()
        for adapters, magnitudes in zip(self.adapters, self.magnitudes, strict=True):
            adapters.pop(slot, None)
            magnitudes.pop(slot, None)
        self._tabulate(slot)

    def _tabulate(self, slot: int) -> None:
        """Tell the kernels where the slot's adapters are; layers where it has none have zeros."""
        for layer in self.layers:
            adapter = layer.adapters.get(slot)
            layer.table_S5[slot].copy_(torch.tensor(adapter.places if adapter else [0] * 5))
            layer.scales_S2[slot].copy_(torch.tensor(adapter.scales if adapter else [0.0] * 2))
            layer.tabulate()

    def tensors(self, row: Row, settings: TrialSettings, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return a row's used part as PEFT names it: ``<layer>.lora_A.weight`` [r, D],
        ``<layer>.lora_B.weight`` [O, r], and with DoRA ``<layer>.lora_magnitude_vector`` [O]."""
        state = {}
        for index, a_RD, b_RO in self.views(row, settings, names):
            state[f"{self.names[index]}.lora_A.weight"] = a_RD.detach().cpu().contiguous()
            state[f"{self.names[index]}.lora_B.weight"] = b_RO.detach().T.cpu().contiguous()
        for index, m_O in self._magnitudes(row, settings, names).items():
            state[f"{self.names[index]}.{MAGNITUDE}"] = m_O.detach().cpu()
        return state

    @torch.no_grad()
    def load(
        self,
        row: Row,
        settings: TrialSettings,
        names: Sequence[str],
        state: Mapping[str, torch.Tensor],
    ) -> None:
        """Load what `tensors` returned."""
        for index, a_RD, b_RO in self.views(row, settings, names):
            a_RD.copy_(state[f"{self.names[index]}.lora_A.weight"])
            b_RO.copy_(state[f"{self.names[index]}.lora_B.weight"].T)
        for index, m_O in self._magnitudes(row, settings, names).items():
            m_O.copy_(state[f"{self.names[index]}.{MAGNITUDE}"])
