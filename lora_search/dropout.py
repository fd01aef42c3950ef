"""Dropout masks that depend on nothing but the trial, the example, the token and the layer.

A counter-based hash (the finalizer of MurmurHash3) instead of a generator with state: whoever shares the
pass, in whichever slot, on a first run or a repeated one, the same elements are dropped.

One 32-bit hash decides about two elements, and a mask is applied to the bits of a number: 0.2 ms for 976 x
576 elements in bfloat16, where comparing and multiplying by bool take 1.0 ms.
"""

import torch

GOLDEN = 0x9E3779B9
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

    Token and feature keys are well mixed already: their product needs one round more, not three.
    """
    pair = torch.arange((width + 1) // 2, dtype=torch.int32, device=key_T.device)
    features = mix(pair + _int32(layer * GOLDEN)).bitwise_or_(1)
    h = key_T[:, None] * features
    h = h.bitwise_xor_(h >> 15).mul_(_int32(0x2C1B3C6D))
    halves = h.view(torch.int16)[:, :width].bitwise_right_shift_(1)  # 15 bits: the difference never overflows
    # The sign of threshold - hash: negative where the element stays.
    return torch.sub(threshold_T[:, None], halves, out=halves).bitwise_right_shift_(15)


def masked(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return x with exact zeros where an element is dropped."""
    return x.view(BITS[x.element_size()]).bitwise_and(kept).view(x.dtype)


def mask_(x: torch.Tensor, kept: torch.Tensor) -> None:
    """Zero what is dropped, in place."""
    x.view(BITS[x.element_size()]).bitwise_and_(kept)


def threshold(probability: float) -> int:
    """Return the int16 up to which a 15-bit hash drops its element: in steps of 1/32768."""
    return round(probability * 2**15) - 2**14 - 1
