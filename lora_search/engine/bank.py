"""The slot bank: the adapters of all slots over one frozen base, converted to and from PEFT's names.

A slot has a row (`row`) while a trial is in it: memory as the trial needs it, not as the largest would.

Legend: S slots, R rank, D input width, O output width, K rows of embedding or head.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn

from lora_search.engine.row import Layout, Row, Site, lay_out
from lora_search.engine.starts import Factors, Start, Subtract
from lora_search.files.peft import is_of_base, lora_scaling, plain_weight, with_start, without_start
from lora_search.model.embedding import Embedding
from lora_search.ops.dora import Magnitude, Rescale
from lora_search.ops.fused import GatedSilu
from lora_search.ops.lora import (
    PLAIN,
    TILE,
    AddAdapters,
    Bias,
    Dense,
    Layer,
    Plan,
    Products,
    ReplaceBias,
    SlotAdapter,
)
from lora_search.ops.products import products_for, tiles
from lora_search.ops.tokens import Embed, Tokens, Whole
from lora_search.trial import TrialSettings

BYTES_PER_PARAMETER = 16  # theta, gradient and two moments in float32


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
        if self._has_any(bank.starts):
            added = Subtract.apply(added, x, bank.starts[self.layer], self.plan)  # type: ignore[no-untyped-call]
        if self._has_any(bank.magnitudes):
            weight, magnitudes = partial(plain_weight, self.base), bank.magnitudes[self.layer]
            added = Rescale.apply(added, x, weight, self.base.bias, magnitudes, self.plan, self.layer)  # type: ignore[no-untyped-call]
        return self._with_biases(added)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for silu(gate) * up, which is not kept where only adapters need it."""
        bank = self._bank[0]
        needs_it = self._has_any(bank.magnitudes) or self._has_any(bank.starts)
        if self._dense is None or not self._has_any(bank.adapters) or needs_it:
            return self(GatedSilu.apply(gate, up))  # type: ignore[no-any-return, no-untyped-call]
        return self._with_biases(self._add(None, gate, up))

    def _with_biases(self, y: torch.Tensor) -> torch.Tensor:
        biases = self._bank[0].biases
        if self._has_any(biases):
            y = ReplaceBias.apply(y, biases[self.layer], self.plan)  # type: ignore[no-untyped-call]
        return y

    def _add(self, y: torch.Tensor | None, x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        bank, width = self._bank[0], self.base.out_features
        layer, anchor = bank.layers[self.layer], bank.anchors[self.part]
        added = AddAdapters.apply(y, x, up, self._dense, anchor, layer, self.plan, bank.products, width)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, added)

    def _has_any(self, by_layer: Sequence[Mapping[int | None, object]]) -> bool:
        """Return whether a slot with tokens in the pass has something on this layer."""
        return self.plan is not None and not by_layer[self.layer].keys().isdisjoint(self.plan.slots)


class SlotBank:
    """Holds the slots' rows, and puts their adapters into the model's layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype = torch.float32,
        products: Products | None = None,
        trains_rows: bool = False,
    ) -> None:
        self.names, self._bases = list(layers), list(layers.values())
        self.devices = list(dict.fromkeys(base.weight.device for base in self._bases))
        known = {products or products_for(device, dtype) for device in self.devices}
        self.products = known.pop() if len(known) == 1 else PLAIN
        self.num_slots, self.dtype, self.max_rank = num_slots, dtype, max_rank
        self.rows: dict[int, Row] = {}  # of the slots that have a trial
        self.sites = [self._site(index, name, base) for index, (name, base) in enumerate(layers.items())]
        self.embedding = Embedding(model) if trains_rows else None
        self.factors = Factors(self._bases, max_rank)
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
        self.starts: list[dict[int | None, Start]] = [{} for _ in self.names]
        self.biases: list[dict[int | None, Bias]] = [{} for _ in self.names]
        self.embeddings: dict[int | None, Tokens | Whole] = {}
        self.tokens_of_head: dict[int | None, Tokens] = {}
        self.heads: dict[int | None, Whole] = {}
        if self.embedding is not None:
            self._handle = self.embedding.module.register_forward_hook(self._embed)
        self.plans: list[Plan | None] = [None for _ in self.devices]
        for site, base in zip(self.sites, self._bases, strict=True):
            parent, _, child = site.name.rpartition(".")
            setattr(model.get_submodule(parent), child, SlotLinear(base, self, site.index, site.part))

    def _site(self, index: int, name: str, base: nn.Linear) -> Site:
        part, has_bias = self.devices.index(base.weight.device), base.bias is not None
        return Site(index, name, base.in_features, base.out_features, part, has_bias)

    @property
    def factor_bytes(self) -> int:
        """The host memory of the factors that all trials with the same init share."""
        return 4 * self.max_rank * sum(site.d_in + site.d_out for site in self.sites)

    def set_plan(self, plan: Plan, upload: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Assign the tokens of the next passes to slots."""
        if self.products is not PLAIN:
            rows = {slot: self.num_slots if slot is None else slot for slot in plan.slots}
            parts_P3, tiles_N3 = (upload(tiles(rows, plan, size)) for size in (None, TILE))
            plan = replace(plan, parts_P3=parts_P3, tiles_N3=tiles_N3)
        self.plans = [plan.on(device) for device in self.devices]

    def remove(self, model: nn.Module) -> None:
        """Restore the model's own layers."""
        if self.embedding is not None:
            self._handle.remove()
        for name in self.names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, model.get_submodule(name).base)

    def _embed(self, _: nn.Module, inputs: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        plan = self.plans[0]
        if plan is None or self.embedding is None or self.embeddings.keys().isdisjoint(plan.slots):
            return embedded
        rest = self.embedding.scale, self.anchors[0], self.embeddings, plan
        return cast(torch.Tensor, Embed.apply(embedded, inputs[0], *rest))  # type: ignore[no-untyped-call]

    def layout(self, settings: TrialSettings, names: Sequence[str]) -> Layout:
        """Return where a trial with adapters on the named layers would have its parameters."""
        owned = self.embedding.owned(settings).values() if self.embedding is not None else ()
        rows = {name: tuple(base_KD.shape) for name, base_KD in owned}
        wanted = set(names)
        sites = [site for site in self.sites if site.name in wanted]
        return lay_out(sites, settings, rows, len(self.devices))

    def bytes_of(self, settings: TrialSettings, names: Sequence[str]) -> int:
        """Return the memory of a trial in a slot, on the device where it takes most: its row, and the
        optimizer's moments."""
        copy = 0 if self.dtype == torch.float32 else self.dtype.itemsize
        each = BYTES_PER_PARAMETER + copy + settings.has_start * self.dtype.itemsize
        return each * max(self.layout(settings, names).sizes)

    def admit(self, slot: int, settings: TrialSettings, names: Sequence[str], seed: int) -> None:
        """Give the slot fresh adapters on the named layers: A as PEFT draws it (Kaiming uniform with a =
        sqrt 5, or Gaussian), B zero; or PiSSA's or OLoRA's factors of the layer's weight."""
        self.make_room(slot, settings, names)
        row = self.rows[slot]
        if self.embedding is not None:
            for name, base_KD in self.embedding.owned(settings).values():
                row.layout.rows[name].of(row.theta).copy_(base_KD)
        for index, bias in row.layout.bias.items():
            bias.of(row.theta).copy_(self._bases[index].bias)
        if row.start:
            self._start(slot, settings)
        else:
            _draw(row, settings, torch.Generator().manual_seed(seed))
        self.refresh(slot)
        for magnitudes in self.magnitudes:
            if slot in magnitudes:  # as B is zero: W's own norms, and gains of 1
                magnitudes[slot].m_O.copy_(magnitudes[slot].norm_O)
                magnitudes[slot].gain_O.fill_(1.0)

    def make_room(self, slot: int, settings: TrialSettings, names: Sequence[str]) -> None:
        """Give the slot adapters of zeros on the named layers."""
        self.release(slot)
        layout = self.layout(settings, names)
        row = self.rows[slot] = Row.of(layout, self.devices, self.dtype, settings.has_start)
        for (index, *used), (_, *grads) in zip(layout.pairs(row.used), layout.pairs(row.grad), strict=True):
            scaling = lora_scaling(settings, self.names[index])
            pair = (used[0], used[1], grads[0], grads[1])
            self.adapters[index][slot] = SlotAdapter(*pair, scaling, settings.dropout)
        self._tabulate(slot)
        for index, m in layout.m.items():
            m_O = m.of(row.theta)
            parts = m_O, m.of(row.grad), torch.empty_like(m_O), torch.empty_like(m_O)
            self.magnitudes[index][slot] = Magnitude(*parts, settings.dropout)
        for index, bias in layout.bias.items():
            base_O = self._bases[index].bias
            self.biases[index][slot] = Bias(bias.of(row.used), base_O, bias.of(row.grad))
        self._own_rows(slot, settings)
        for index, a_RD, b_RO in layout.pairs(row.start) if row.start else ():
            self.starts[index][slot] = Start(a_RD, b_RO, self.adapters[index][slot].scaling)

    def _own_rows(self, slot: int, settings: TrialSettings) -> None:
        """Tell embedding and head of the slot's rows."""
        if self.embedding is None:
            return
        row, is_tied = self.rows[slot], self.embedding.is_tied
        ids_K = torch.tensor(settings.trainable_token_indices, device=self.devices[0])
        for place, (name, _) in self.embedding.owned(settings).items():
            used, grad = (row.layout.rows[name].of(parts) for parts in (row.used, row.grad))
            if settings.modules_to_save and place == 0:
                self.embeddings[slot] = Whole(used, grad, self.embedding.module.padding_idx)
            elif settings.modules_to_save:
                self.heads[slot] = Whole(used, grad)
            elif place == 0:
                self.embeddings[slot] = Tokens(ids_K, used, grad)
            if settings.trainable_token_indices and (place == 1 or is_tied):
                self.tokens_of_head[slot] = Tokens(ids_K, used, grad)

    def _start(self, slot: int, settings: TrialSettings) -> None:
        """Set adapters and starts to the same factors, of PiSSA or OLoRA."""
        row = self.rows[slot]
        views = (row.layout.pairs(parts) for parts in (row.start, row.theta))
        for (index, *start), (_, *fresh) in zip(*views, strict=True):
            known = self.factors.of(index, settings.init, len(fresh[0]))
            scale = 1.0 if settings.init == "olora" else self.starts[index][slot].scaling ** -0.5
            for factor, start_RW, fresh_RW in zip(known, start, fresh, strict=True):
                start_RW[: len(factor)].copy_(factor[: len(start_RW)] * scale)
                fresh_RW.copy_(start_RW)

    def refresh(self, slot: int) -> None:
        """Let the passes see the slot's changed parameters; renew DoRA's norms."""
        self.rows[slot].refresh()
        for base, adapters, magnitudes in zip(self._bases, self.adapters, self.magnitudes, strict=True):
            if slot in magnitudes:
                used = adapters[slot]
                update_OD = used.b_RO.float().T @ used.a_RD.float()
                magnitudes[slot].renew(plain_weight(base), update_OD.mul_(used.scaling))

    def release(self, slot: int) -> None:
        """Empty the slot and free its memory."""
        self.rows.pop(slot, None)
        of_layers = *self.adapters, *self.magnitudes, *self.starts, *self.biases
        for by_slot in (*of_layers, self.embeddings, self.tokens_of_head, self.heads):
            by_slot.pop(slot, None)  # type: ignore[attr-defined]
        self._tabulate(slot)

    def _tabulate(self, slot: int) -> None:
        """Tell the kernels where the slot's adapters are; layers where it has none have zeros."""
        for layer in self.layers:
            adapter = layer.adapters.get(slot)
            layer.table_S5[slot].copy_(torch.tensor(adapter.places if adapter else [0] * 5))
            layer.scales_S2[slot].copy_(torch.tensor(adapter.scales if adapter else [0.0] * 2))
            layer.tabulate()

    def exported(self, slot: int) -> dict[str, torch.Tensor]:
        """Return the slot's adapter as plain PEFT loads it, on the host: with a start of twice the rank."""
        row = self.rows[slot]
        state = row.layout.tensors(row.theta)
        if row.start:
            start = [part_P.float() for part_P in row.start]
            state = with_start(state, row.layout.tensors(start))
        return {  # on a CPU they are views of the row
            name: tensor.to(self.dtype if is_of_base(name) else tensor.dtype, copy=True)
            for name, tensor in state.items()
        }

    @torch.no_grad()
    def place(
        self, slot: int, settings: TrialSettings, names: Sequence[str], state: Mapping[str, torch.Tensor]
    ) -> None:
        """Give the slot an adapter that `exported` returned."""
        self.make_room(slot, settings, names)
        row = self.rows[slot]
        if row.start:
            state, start = without_start(state)
            row.layout.load(row.start, start)
        row.layout.load(row.theta, state)
        self.refresh(slot)


def _draw(row: Row, settings: TrialSettings, generator: torch.Generator) -> None:
    for _, a_RD, _ in row.layout.pairs(row.theta):
        fresh, bound = torch.empty(a_RD.shape), 1.0 / math.sqrt(a_RD.shape[1])
        if settings.init == "gaussian":
            a_RD.copy_(fresh.normal_(0.0, 1.0 / len(a_RD), generator=generator))
        else:
            a_RD.copy_(fresh.uniform_(-bound, bound, generator=generator))
