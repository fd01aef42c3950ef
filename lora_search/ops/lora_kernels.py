"""The products of `lora` as three Triton kernels, each for all slots of a pass: a loop over 32 slots and 200
layers would be 20,000 launches. Dropout happens inside, so no masked copy of x is written or read: by count
438 -> 394 ms for a pass of 8k tokens (8B, all linear layers: `python -m tests.benchmarks.predict 8B`).

A program works on a tile, tokens of one slot from the slot's own start: neighbours change no bit. A slot
without an adapter on the layer has rank 0, and its programs end at once. Never run on a GPU yet: compiled for
four architectures and run in Triton's interpreter (tests/ops/test_lora_kernels.py).

Legend: S slots and one for the bare base, N tiles, R rank, T tokens, W width of the wide side (D or O).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from lora_search.ops.dropout import LAST_ROUND, Mask, pair_keys
from lora_search.ops.lora import TILE, Layer, Plan, Products

LAST = tl.constexpr(LAST_ROUND)
COLUMNS = tl.constexpr(5)  # of the table: where A, B and their gradients lie, and the rank


@triton.jit
def _place(table, slot, side: tl.constexpr, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to one of a slot's matrices, and its rank."""
    place = tl.load(table + slot * COLUMNS + side).to(tl.pointer_type(kind))
    rank = tl.load(table + slot * COLUMNS + 4).to(tl.int32)
    return tl.multiple_of(place, 16) if ALIGNED else place, rank


@triton.jit
def _read(x, keys, thresholds, pairs, t, end, w, width, DROP: tl.constexpr):
    """Return x [tokens, widths], with what dropout leaves of it: the same bits as `dropout.drop`."""
    part = tl.load(
        x + t.to(tl.int64)[:, None] * width + w[None, :], (t < end)[:, None] & (w < width)[None, :], 0.0
    )
    return _dropped(part, keys, thresholds, pairs, t, end, w, width) if DROP else part


@triton.jit
def _dropped(part, keys, thresholds, pairs, t, end, w, width):
    key = tl.load(keys + t, t < end, 0)
    threshold = tl.load(thresholds + t, t < end, 0).to(tl.int32)
    h = key[:, None] * tl.load(pairs + w // 2, w < width, 0)[None, :]
    h = (h ^ (h >> 15)) * LAST
    half = tl.where((w % 2 == 1)[None, :], h, h << 16) >> 17
    return tl.where(half > threshold[:, None], part, 0.0)


@triton.jit
def narrow_kernel(
    x, hidden, table, scales, tiles, keys, thresholds, pairs, width, most,
    SIDE: tl.constexpr, DROP: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, WIDTHS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    tile = tiles + 3 * tl.program_id(0)
    slot, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    weight, rank = _place(table, slot, SIDE, x.dtype.element_ty, ALIGNED)
    t, r = start + tl.arange(0, TOKENS), tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    if tl.program_id(1) * RANKS >= rank:
        return
    total = tl.zeros((TOKENS, RANKS), tl.float32)
    for first in range(0, width, WIDTHS):
        w = first + tl.arange(0, WIDTHS)
        part = _read(x, keys, thresholds, pairs, t, end, w, width, DROP)
        turned = tl.load(
            weight + r[None, :] * width + w[:, None], (r < rank)[None, :] & (w < width)[:, None], 0.0
        )
        total = tl.dot(part, turned, total, input_precision="ieee")
    total *= tl.load(scales + 2 * slot)
    inside = (t < end)[:, None] & (r < rank)[None, :]
    tl.store(hidden + t[:, None] * most + r[None, :], total.to(hidden.dtype.element_ty), inside)


@triton.jit
def widen_kernel(
    hidden, y, table, tiles, keys, thresholds, pairs, width, most,
    SIDE: tl.constexpr, DROP: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, WIDTHS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    tile = tiles + 3 * tl.program_id(0)
    slot, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    weight, rank = _place(table, slot, SIDE, hidden.dtype.element_ty, ALIGNED)
    t, w = start + tl.arange(0, TOKENS), tl.program_id(1) * WIDTHS + tl.arange(0, WIDTHS)
    total = tl.zeros((TOKENS, WIDTHS), tl.float32)
    for first in range(0, rank, RANKS):
        r = first + tl.arange(0, RANKS)
        part = tl.load(hidden + t[:, None] * most + r[None, :], (t < end)[:, None] & (r < rank)[None, :], 0.0)
        right = tl.load(
            weight + r[:, None] * width + w[None, :], (r < rank)[:, None] & (w < width)[None, :], 0.0
        )
        total = tl.dot(part, right, total, input_precision="ieee")
    if DROP:
        total = _dropped(total, keys, thresholds, pairs, t, end, w, width)
    inside = (t < end)[:, None] & (w < width)[None, :]
    tl.store(y + t.to(tl.int64)[:, None] * width + w[None, :], total.to(y.dtype.element_ty), inside)


@triton.jit
def collect_kernel(
    hidden, x, table, parts, keys, thresholds, pairs, width, most,
    SIDE: tl.constexpr, DROP: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, WIDTHS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    part = parts + 3 * tl.program_id(0)
    slot, start, end = tl.load(part), tl.load(part + 1), tl.load(part + 2)
    grads, rank = _place(table, slot, SIDE + 2, tl.float32, ALIGNED)
    w, r = (
        tl.program_id(1) * WIDTHS + tl.arange(0, WIDTHS),
        tl.program_id(2) * RANKS + tl.arange(0, RANKS),
    )
    if tl.program_id(2) * RANKS >= rank:
        return
    total = tl.zeros((RANKS, WIDTHS), tl.float32)
    for first in range(start, end, TOKENS):
        t = first + tl.arange(0, TOKENS)
        left = tl.load(hidden + t[None, :] * most + r[:, None], (t < end)[None, :] & (r < rank)[:, None], 0.0)
        right = _read(x, keys, thresholds, pairs, t, end, w, width, DROP)
        total = tl.dot(left, right, total, input_precision="ieee")
    grad = grads + r[:, None] * width + w[None, :]
    inside = (r < rank)[:, None] & (w < width)[None, :]
    tl.store(grad, tl.load(grad, inside, 0.0) + total, inside)


def narrow(layer: Layer, side: int, x_TW: torch.Tensor, plan: Plan, mask: Mask | None) -> torch.Tensor:
    """See `lora.narrow`."""
    assert plan.tiles_N3 is not None
    x_TW, most = x_TW.contiguous(), layer.rank
    hidden_TR = x_TW.new_empty(len(x_TW), most)
    scales_S = layer.scales_S2[:, int(plan.drops) :]
    grid = len(plan.tiles_N3), triton.cdiv(most, _ranks(most))
    narrow_kernel[grid](
        x_TW, hidden_TR, layer.table_S5, scales_S, plan.tiles_N3, *_dropout(layer, x_TW, mask), x_TW.shape[1],
        most, SIDE=side, **_constants(layer, mask, x_TW),
    )  # fmt: skip
    return hidden_TR


def widen(
    layer: Layer, side: int, hidden_TR: torch.Tensor, width: int, plan: Plan, mask: Mask | None
) -> torch.Tensor:
    """See `lora.widen`."""
    assert plan.tiles_N3 is not None
    y_TW, most = hidden_TR.new_empty(len(hidden_TR), width), layer.rank
    constants = _constants(layer, mask, y_TW)
    grid = len(plan.tiles_N3), triton.cdiv(width, constants["WIDTHS"])
    widen_kernel[grid](
        hidden_TR, y_TW, layer.table_S5, plan.tiles_N3, *_dropout(layer, y_TW, mask), width, most, SIDE=side,
        **constants,
    )  # fmt: skip
    return y_TW


def collect(
    layer: Layer, side: int, hidden_TR: torch.Tensor, x_TW: torch.Tensor, plan: Plan, mask: Mask | None
) -> None:
    """See `lora.collect`."""
    assert plan.parts_P3 is not None
    x_TW, most = x_TW.contiguous(), layer.rank
    constants = _constants(layer, mask, x_TW)
    grid = (
        len(plan.parts_P3),
        triton.cdiv(x_TW.shape[1], constants["WIDTHS"]),
        triton.cdiv(most, _ranks(most)),
    )
    collect_kernel[grid](
        hidden_TR, x_TW, layer.table_S5, plan.parts_P3, *_dropout(layer, x_TW, mask), x_TW.shape[1], most,
        SIDE=side, **constants,
    )  # fmt: skip


def _dropout(layer: Layer, wide: torch.Tensor, mask: Mask | None) -> tuple[torch.Tensor, ...]:
    """Return the keys of tokens, their thresholds, and the keys of pairs of features; else anything."""
    if mask is None:
        return wide, wide, wide
    return mask.key_T, mask.threshold_T, pair_keys(layer.index, (wide.shape[1] + 1) // 2, wide.device)


def _constants(layer: Layer, mask: Mask | None, wide: torch.Tensor) -> dict[str, Any]:
    widths = 64 if wide.element_size() == 2 else 32  # as many bytes of shared memory
    sizes = {"TOKENS": TILE, "RANKS": _ranks(layer.rank), "WIDTHS": widths}
    return {"DROP": int(mask is not None), "ALIGNED": int(layer.is_aligned), **sizes}


def _ranks(most: int) -> int:
    """Return the ranks of a program: tensor cores multiply blocks of 16 at least."""
    return min(64, max(16, triton.next_power_of_2(most)))


KERNELS = Products(narrow, widen, collect)
