"""A slot's row: the parameters of the trial that is in the slot, as many as that trial has, and no more.

A row has a flat part on each device of the base, beside its layers: rows of embedding and head that the trial
trains, some or all (in the first part), A of every layer that it adapts, then B transposed of every layer,
then magnitudes with DoRA, then trained biases. The optimizer works on parts, the layers on views into them.

Legend: P parameters, R rank, D input width, O output width, K rows of embedding or head.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_search.files.peft import BIAS, lora_rank
from lora_search.trial import TrialSettings

MAGNITUDE = "lora_magnitude_vector"
Parts = Sequence[torch.Tensor]  # flat numbers [P] of one slot: a tensor on each device of the base


@dataclass(frozen=True)
class Site:
    """A layer that adapters may be on: its number, name and widths, and the part of a row beside it."""

    index: int
    name: str
    d_in: int
    d_out: int
    part: int
    has_bias: bool


@dataclass(frozen=True)
class Entry:
    """A matrix or a vector of a row: in which part, there from where to where, and its shape."""

    part: int
    where: slice
    shape: tuple[int, ...]

    def of(self, parts: Parts) -> torch.Tensor:
        """Return it as a view."""
        return parts[self.part][self.where].view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where a trial's parameters are: rows of embedding and head by PEFT's names, the others by the layer's
    number. ``sizes``: of the parts; ``starts_of_b``, ``starts_of_bias``: where the matrices B and the biases
    begin in each."""

    names: Mapping[int, str]
    rows: Mapping[str, Entry]
    a: Mapping[int, Entry]
    b: Mapping[int, Entry]
    m: Mapping[int, Entry]
    bias: Mapping[int, Entry]
    starts_of_b: tuple[int, ...]
    starts_of_bias: tuple[int, ...]
    sizes: tuple[int, ...]

    def pairs(self, parts: Parts) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (layer number, A [R, D], B transposed [R, O]) as views."""
        for index in self.names:
            yield index, self.a[index].of(parts), self.b[index].of(parts)

    def views(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Return everything by PEFT's names, as views: ``<layer>.lora_A.weight`` [R, D],
        ``<layer>.lora_B.weight`` [O, R], with DoRA ``<layer>.lora_magnitude_vector`` [O], trained biases
        ``<layer>.base_layer.bias`` [O], and trained rows of embedding and head [K, D]."""
        found = {name: entry.of(parts) for name, entry in self.rows.items()}
        for index, a_RD, b_RO in self.pairs(parts):
            found[f"{self.names[index]}.lora_A.weight"] = a_RD
            found[f"{self.names[index]}.lora_B.weight"] = b_RO.T
        for kind, entries in ((MAGNITUDE, self.m), (BIAS, self.bias)):
            found |= {f"{self.names[index]}.{kind}": entry.of(parts) for index, entry in entries.items()}
        return found

    def tensors(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Return `views` on the host."""
        return {name: view.detach().cpu().contiguous() for name, view in self.views(parts).items()}

    @torch.no_grad()
    def load(self, parts: Parts, state: Mapping[str, torch.Tensor]) -> None:
        """Load what `tensors` returned."""
        for name, view in self.views(parts).items():
            view.copy_(state[name])


def lay_out(
    sites: Sequence[Site], settings: TrialSettings, rows: Mapping[str, tuple[int, ...]], num_parts: int
) -> Layout:
    """Return the layout of a trial with adapters on these layers and trained rows of these shapes."""
    ends = [0] * num_parts

    def take(part: int, *shape: int) -> Entry:
        start, ends[part] = ends[part], ends[part] + math.prod(shape)
        return Entry(part, slice(start, ends[part]), shape)

    ranks = {site.index: lora_rank(settings, site.name) for site in sites}
    own = {name: take(0, *shape) for name, shape in rows.items()}
    a = {site.index: take(site.part, ranks[site.index], site.d_in) for site in sites}
    starts_of_b = tuple(ends)
    b = {site.index: take(site.part, ranks[site.index], site.d_out) for site in sites}
    m = {site.index: take(site.part, site.d_out) for site in sites if settings.use_dora}
    starts_of_bias = tuple(ends)
    biased = [site for site in sites if settings.trains_biases and site.has_bias]
    bias = {site.index: take(site.part, site.d_out) for site in biased}
    names = {site.index: site.name for site in sites}
    return Layout(names, own, a, b, m, bias, starts_of_b, starts_of_bias, tuple(ends))


@dataclass(frozen=True)
class Row:
    """The memory of one slot. ``used`` is theta as the matmuls read it, in the dtype of the base (in float32
    theta itself); ``start`` is what PiSSA's and OLoRA's base loses, empty for others."""

    layout: Layout
    theta: Parts
    grad: Parts
    used: Parts
    start: Parts

    @classmethod
    def of(
        cls, layout: Layout, devices: Sequence[torch.device], dtype: torch.dtype, has_start: bool
    ) -> "Row":
        """Return a row of zeros."""
        theta = [torch.zeros(n, device=device) for n, device in zip(layout.sizes, devices, strict=True)]
        used = [theta_P.to(dtype) for theta_P in theta]
        start = [torch.zeros_like(used_P) for used_P in used if has_start]
        return cls(layout, theta, [torch.zeros_like(theta_P) for theta_P in theta], used, start)

    def refresh(self) -> None:
        """Copy theta, which has changed, to where the matmuls read it."""
        for used_P, theta_P in zip(self.used, self.theta, strict=True):
            if used_P is not theta_P:
                used_P.copy_(theta_P)
