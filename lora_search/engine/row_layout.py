"""Where the layers' adapters are in a slot's row of parameters: it has a part on each device of the base."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Row = Sequence[torch.Tensor]  # one slot's parameters [P]: a part on each device


@dataclass(frozen=True)
class Place:
    """Where a layer's A, B and magnitudes are: in which part of a row, and there from where to where."""

    part: int
    a: slice
    b: slice
    m: slice


def lay_out(
    shapes: Sequence[tuple[int, int]], parts: Sequence[int], rank: int, has_magnitudes: bool, first: int = 0
) -> tuple[list[Place], list[int], list[int]]:
    """Return each layer's place, and for each part where the matrices B begin, and its size.
    The first part begins with ``first`` numbers for trained tokens."""
    ends = [first] + [0] * max(parts)

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
