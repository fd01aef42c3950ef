"""The slot bank: the adapters of all slots over one frozen base, converted to and from PEFT's names.

Legend: S slots, P parameters of one slot, R rank, D input width, O output width, T tokens of a pass.
A slot's adapters are a row, with one flat part of theta_SP on each device of the base, beside its layers:
rows of embedding and head for as many tokens as a trial may train (in the first part), A
[R, D] of every layer, then B transposed [R, O] of every layer, sized for the largest rank, then magnitudes
[O] if a trial may have DoRA; entries not in use are zero. Optimizer and checkpoint work on rows, the layers
on views into them, in the dtype of the base.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn

from lora_search.engine.row_layout import Row, lay_out, row_of
from lora_search.engine.starts import Factors, Start, Subtract
from lora_search.files.peft import lora_rank, lora_scaling, plain_weight, with_start, without_start
from lora_search.model.embedding import Embedding
from lora_search.ops.dora import Magnitude, Rescale
from lora_search.ops.fused import GatedSilu
from lora_search.ops.lora import PLAIN, TILE, AddAdapters, Dense, Layer, Plan, Products, SlotAdapter
from lora_search.ops.products import products_for, tiles
from lora_search.ops.tokens import Embed, Tokens
from lora_search.trial import TrialSettings

MAGNITUDE = "lora_magnitude_vector"


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
        return added

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for silu(gate) * up, which is not kept where only adapters need it."""
        bank = self._bank[0]
        needs_it = self._has_any(bank.magnitudes) or self._has_any(bank.starts)
        if self._dense is None or not self._has_any(bank.adapters) or needs_it:
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
        has_starts: bool = False,
        max_token_rows: int = 0,
    ) -> None:
        self.names, self._bases = list(layers), list(layers.values())
        self.shapes = [(layer.in_features, layer.out_features) for layer in layers.values()]
        self.devices = list(dict.fromkeys(base.weight.device for base in self._bases))
        known = {products or products_for(device, dtype) for device in self.devices}
        self.products = known.pop() if len(known) == 1 else PLAIN
        self.num_slots, self.dtype, self.max_rank = num_slots, dtype, max_rank
        parts = [self.devices.index(base.weight.device) for base in self._bases]
        self.embedding = Embedding(model) if max_token_rows else None
        self._start_of_a = max_token_rows * self.embedding.width if self.embedding else 0
        layout = lay_out(self.shapes, parts, max_rank, has_magnitudes, self._start_of_a)
        self._places, self.starts_of_b, sizes = layout
        self.theta = [torch.zeros(num_slots, n, device=d) for n, d in zip(sizes, self.devices, strict=True)]
        self.grad = [torch.zeros_like(theta_SP) for theta_SP in self.theta]
        self.used = [theta_SP.to(dtype) for theta_SP in self.theta]  # the matmuls'; in float32 theta itself
        self.start = [used_SP.new_zeros(num_slots, has_starts * used_SP.shape[1]) for used_SP in self.used]
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
        self.tokens: dict[int | None, Tokens] = {}
        self._of_head: dict[int | None, Tokens] = {}  # rows that are not the embedding's
        if self.embedding is not None:
            self._handle = self.embedding.module.register_forward_hook(self._embed)
        self.plans: list[Plan | None] = [None for _ in self.devices]
        for index, (name, layer) in enumerate(layers.items()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SlotLinear(layer, self, index, parts[index]))

    @property
    def num_parameters(self) -> int:
        """How many parameters a slot has, on all devices."""
        return sum(theta_SP.shape[1] for theta_SP in self.theta)

    @property
    def tokens_of_head(self) -> dict[int | None, Tokens]:
        """The rows of the head that slots train, its own or with the embedding."""
        return self.tokens if self.embedding is not None and self.embedding.is_tied else self._of_head

    @property
    def factor_bytes(self) -> int:
        """The host memory of the factors that all trials with the same init share."""
        return 4 * sum(start_SP.shape[1] for start_SP in self.start)

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

    def _embed(self, _: nn.Module, inputs: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        plan = self.plans[0]
        if plan is None or self.embedding is None or self.tokens.keys().isdisjoint(plan.slots):
            return embedded
        rest = self.embedding.scale, self.anchors[0], self.tokens, plan
        return cast(torch.Tensor, Embed.apply(embedded, inputs[0], *rest))  # type: ignore[no-untyped-call]

    def _rows(self, row: Row, settings: TrialSettings) -> dict[str, torch.Tensor]:
        """Return the trial's rows of embedding and head [K, D] by PEFT's names, as views into a row."""
        if self.embedding is None or not settings.trainable_token_indices:
            return {}
        rows = row[0][: self._start_of_a].view(-1, self.embedding.width)[: settings.num_token_rows]
        parts = rows.split(len(settings.trainable_token_indices))
        return dict(zip(self.embedding.peft_names, parts, strict=False))

    def admit(self, slot: int, settings: TrialSettings, names: Sequence[str], seed: int) -> None:
        """Give the slot fresh adapters on the named layers: A as PEFT draws it (Kaiming uniform with a =
        sqrt 5, or Gaussian), B zero; or PiSSA's or OLoRA's factors of the layer's weight."""
        self.make_room(slot, settings, names)
        if self.embedding is not None:
            weights = self.embedding.module.weight, self.embedding.head.weight
            fresh = self._rows(row_of(self.theta, slot), settings).values()
            for weight_VD, fresh_KD in zip(weights, fresh, strict=False):
                fresh_KD.copy_(weight_VD[list(settings.trainable_token_indices)])
        if settings.has_start:
            self._start(slot, settings, names)
        else:
            self._draw(slot, settings, names, torch.Generator().manual_seed(seed))
        self.refresh(slot)
        for magnitudes in self.magnitudes:
            if slot in magnitudes:  # as B is zero: W's own norms, and gains of 1
                magnitudes[slot].m_O.copy_(magnitudes[slot].norm_O)
                magnitudes[slot].gain_O.fill_(1.0)

    def make_room(self, slot: int, settings: TrialSettings, names: Sequence[str]) -> None:
        """Give the slot adapters of zeros on the named layers."""
        self.release(slot)
        views = (self.views(row_of(bank, slot), settings, names) for bank in (self.used, self.grad))
        for (index, *used), (_, *grads) in zip(*views, strict=True):
            scaling = lora_scaling(settings, self.names[index])
            pair = (used[0], used[1], grads[0], grads[1])
            self.adapters[index][slot] = SlotAdapter(*pair, scaling, settings.dropout)
        self._tabulate(slot)
        for index, m_O in self._magnitudes(row_of(self.theta, slot), settings, names).items():
            grad_O = self._magnitudes(row_of(self.grad, slot), settings, names)[index]
            parts = m_O, grad_O, torch.empty_like(m_O), torch.empty_like(m_O)
            self.magnitudes[index][slot] = Magnitude(*parts, settings.dropout)
        rows = (self._rows(row_of(bank, slot), settings).values() for bank in (self.used, self.grad))
        for by_slot, used_KD, grad_KD in zip((self.tokens, self._of_head), *rows, strict=False):
            ids_K = torch.tensor(settings.trainable_token_indices, device=self.devices[0])
            by_slot[slot] = Tokens(ids_K, used_KD, grad_KD)
        for index, a_RD, b_RO in self.views(
            row_of(self.start, slot), settings, names if settings.has_start else ()
        ):
            self.starts[index][slot] = Start(a_RD, b_RO, self.adapters[index][slot].scaling)

    def _draw(
        self, slot: int, settings: TrialSettings, names: Sequence[str], generator: torch.Generator
    ) -> None:
        for _, a_RD, _ in self.views(row_of(self.theta, slot), settings, names):
            fresh, bound = torch.empty(a_RD.shape), 1.0 / math.sqrt(a_RD.shape[1])
            if settings.init == "gaussian":
                a_RD.copy_(fresh.normal_(0.0, 1.0 / len(a_RD), generator=generator))
            else:
                a_RD.copy_(fresh.uniform_(-bound, bound, generator=generator))

    def _start(self, slot: int, settings: TrialSettings, names: Sequence[str]) -> None:
        """Set adapters and starts to the same factors, of PiSSA or OLoRA."""
        views = (self.views(row_of(bank, slot), settings, names) for bank in (self.start, self.theta))
        for (index, *start), (_, *fresh) in zip(*views, strict=True):
            known = self.factors.of(index, settings.init, len(fresh[0]))
            scale = 1.0 if settings.init == "olora" else self.starts[index][slot].scaling ** -0.5
            for factor, start_RW, fresh_RW in zip(known, start, fresh, strict=True):
                start_RW[: len(factor)].copy_(factor[: len(start_RW)] * scale)
                fresh_RW.copy_(start_RW)

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
        for bank_SP in (*self.theta, *self.used, *self.grad, *self.start):
            bank_SP[slot].zero_()
        for adapters, magnitudes, starts in zip(self.adapters, self.magnitudes, self.starts, strict=True):
            adapters.pop(slot, None)
            magnitudes.pop(slot, None)
            starts.pop(slot, None)
        self.tokens.pop(slot, None)
        self._of_head.pop(slot, None)
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
        ``<layer>.lora_B.weight`` [O, r], with DoRA ``<layer>.lora_magnitude_vector`` [O], and trained rows of
        the embedding [K, D]."""
        state = {name: rows_KD.detach().cpu() for name, rows_KD in self._rows(row, settings).items()}
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
        for name, rows_KD in self._rows(row, settings).items():
            rows_KD.copy_(state[name])
        for index, a_RD, b_RO in self.views(row, settings, names):
            a_RD.copy_(state[f"{self.names[index]}.lora_A.weight"])
            b_RO.copy_(state[f"{self.names[index]}.lora_B.weight"].T)
        for index, m_O in self._magnitudes(row, settings, names).items():
            m_O.copy_(state[f"{self.names[index]}.{MAGNITUDE}"])

    def exported(self, slot: int, settings: TrialSettings, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the slot's adapter as plain PEFT loads it, on the host: with a start of twice the rank."""
        state = self.tensors(row_of(self.theta, slot), settings, names)
        if settings.has_start:
            start = [part_P.float() for part_P in row_of(self.start, slot)]
            state = with_start(state, self.tensors(start, settings, names))
        return {name: tensor.clone() for name, tensor in state.items()}  # on a CPU they are views of the bank

    @torch.no_grad()
    def place(
        self, slot: int, settings: TrialSettings, names: Sequence[str], state: Mapping[str, torch.Tensor]
    ) -> None:
        """Give the slot an adapter that `exported` returned."""
        self.make_room(slot, settings, names)
        if settings.has_start:
            state, start = without_start(state)
            self.load(row_of(self.start, slot), settings, names, start)
        self.load(row_of(self.theta, slot), settings, names, state)
        self.refresh(slot)
