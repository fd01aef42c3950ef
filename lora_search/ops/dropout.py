"""Dropout masks that depend only on the trial, the example, the token and the layer.

A counter-based hash (the finalizer of MurmurHash3) replaces the stateful generator: the same elements are
dropped whatever the slot, the other trials in the pass, or the number of repeats.

One 32-bit hash decides two elements. On a CPU the mask is computed once and applied to the bits of a number:
0.2 ms for 976 x 576 elements in bfloat16, where comparing and multiplying by bool take 1.0 ms. On CUDA
`lora_kernels` drops inside the matmuls (outside them it took 41 of 438 ms, by the count of
`python -m tests.benchmarks.predict 8B`); DoRA, and loops over slots, have one compiled kernel there instead
of a dozen. No mask is stored.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch

from lora_search.ops.compiled import compiled

GOLDEN = 0x9E3779B9
NOISE = 0x5851F42D
LAST_ROUND = 0x2C1B3C6D
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> an integer of the same size


def _int32(value: int) -> int:
    """Return the value wrapped into the signed 32-bit range, as torch's int32 arithmetic does."""
    return (value + 2**31) % 2**32 - 2**31


def mix(h: torch.Tensor) -> torch.Tensor:
    """Scramble int32 values in place (Appleby's fmix32)."""
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(_int32(0x85EBCA6B))
    h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(_int32(0xC2B2AE35))
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def token_keys(seed: int, ordinals: list[int], lengths: list[int]) -> torch.Tensor:
    """Return one int32 key per token, [sum(lengths)]; ``ordinals`` number a trial's examples in the order
    it sees them."""
    starts = [_int32((seed * 0x27D4EB2F) ^ (ordinal * 0x165667B1)) for ordinal in ordinals]
    rows = mix(torch.tensor(starts, dtype=torch.int32))
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    repeats = torch.tensor(lengths)
    return mix(rows.repeat_interleave(repeats, output_size=sum(lengths)) + positions * _int32(GOLDEN))


def kept(key_T: torch.Tensor, threshold_T: torch.Tensor, layer: int, width: int) -> torch.Tensor:
    """Return one adapted layer's mask, int16 [T, width]: -1 (all bits) where an element stays, 0 elsewhere.

    Token and feature keys are already well mixed: their product needs one more round, not three.
    """
    h = key_T[:, None] * pair_keys(layer, (width + 1) // 2, key_T.device)
    h = h.bitwise_xor_(h >> 15).mul_(_int32(LAST_ROUND))
    halves = h.view(torch.int16)[:, :width].bitwise_right_shift_(1)  # 15 bits: the difference never overflows
    # The sign of threshold - hash: negative where the element stays.
    return torch.sub(threshold_T[:, None], halves, out=halves).bitwise_right_shift_(15)


def uniform(key_T: torch.Tensor, width: int) -> torch.Tensor:
    """Return noise in [-1, 1), float32 [T, width], by the same hash with its full finalizer."""
    feature = mix(torch.arange(width, dtype=torch.int32, device=key_T.device) + _int32(NOISE)).bitwise_or_(1)
    return mix(key_T[:, None] * feature).double().div_(2.0**31).float()


def masked(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return x with exact zeros where an element is dropped."""
    return x.view(BITS[x.element_size()]).bitwise_and(kept).view(x.dtype)


def mask_(x: torch.Tensor, kept: torch.Tensor) -> None:
    """Zero the dropped elements, in place."""
    x.view(BITS[x.element_size()]).bitwise_and_(kept)


@lru_cache(maxsize=4096)  # of every layer: 2.5 MB for all 224 of Llama 3.1 8B
def pair_keys(layer: int, num_pairs: int, device: torch.device) -> torch.Tensor:
    """Return one odd int32 key for each pair of features of a layer."""
    pair = torch.arange(num_pairs, dtype=torch.int32, device=device)
    return mix(pair + _int32(layer * GOLDEN)).bitwise_or_(1)


def drop(
    x: torch.Tensor, key_T: torch.Tensor, threshold_T: torch.Tensor, key_of_pair: torch.Tensor
) -> torch.Tensor:
    """Return the same bits as `masked` with `kept`, by operations that compile into one kernel."""
    feature = torch.arange(x.shape[1], device=x.device)
    h = key_T[:, None] * key_of_pair[feature // 2]
    h = (h ^ (h >> 15)) * _int32(LAST_ROUND)
    half = torch.where(feature % 2 == 1, h, h << 16) >> 17  # the upper or the lower 16 bits, less one
    return torch.where(half > threshold_T[:, None], x, 0.0)


@cache
def compiled_drop(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor] | None:
    """Return `drop` compiled for tensors of that dtype; None if it cannot be compiled or gives different
    bits."""
    key_T = mix(torch.arange(300, dtype=torch.int32, device=device))
    threshold_T = torch.full((300,), threshold(0.3), dtype=torch.int16, device=device)
    x = torch.randn(300, 96, device=device).to(dtype)
    probe = (x, key_T, threshold_T, pair_keys(1, 48, device))
    return compiled("dropout masks", drop, probe, masked(x, kept(key_T, threshold_T, 1, 96)), torch.equal)


class Mask:
    """The dropout of one adapted layer in a pass. Rows are hashed when they are first asked for."""

    def __init__(self, key_T: torch.Tensor, threshold_T: torch.Tensor, layer: int) -> None:
        self.key_T, self.threshold_T, self.layer = key_T, threshold_T, layer
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def apply(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return x, these rows of the pass, with exact zeros where an element is dropped."""
        fast = compiled_drop(x.device, x.dtype) if x.is_cuda else None
        if fast is None:
            return masked(x, self._bits(rows, x.shape[1]))
        pairs = pair_keys(self.layer, (x.shape[1] + 1) // 2, x.device)
        return fast(x, self.key_T[rows], self.threshold_T[rows], pairs)

    def apply_(self, x: torch.Tensor, rows: slice) -> None:
        """Drop elements of x in place."""
        if x.is_cuda:
            x.copy_(self.apply(x, rows))
        else:
            mask_(x, self._bits(rows, x.shape[1]))

    def _bits(self, rows: slice, width: int) -> torch.Tensor:
        place = rows.start, rows.stop
        if place not in self._kept:
            self._kept[place] = kept(self.key_T[rows], self.threshold_T[rows], self.layer, width)
        return self._kept[place]


def threshold(probability: float) -> int:
    """Return the int16 threshold up to which a 15-bit hash drops its element, in steps of 1/32768."""
    return round(probability * 2**15) - 2**14 - 1
