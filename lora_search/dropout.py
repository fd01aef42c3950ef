"""Dropout masks that depend on nothing but the trial, the example, the token and the layer.

A counter-based hash (the finalizer of MurmurHash3) instead of a generator with state: whoever shares the
pass, in whichever slot, on a first run or a repeated one, the same elements are dropped. Five integer
passes per mask.
"""

import torch

GOLDEN = 0x9E3779B9


def _int32(value: int) -> int:
    """Return the value wrapped into the signed 32-bit range, as torch's int32 arithmetic does."""
    return (value + 2**31) % 2**32 - 2**31


def mix(h: torch.Tensor) -> torch.Tensor:
    """Scramble int32 values in place (Appleby's fmix32)."""
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(_int32(0x85EBCA6B))
    h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(_int32(0xC2B2AE35))
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def token_keys(seed: int, ordinals: list[int], lengths: list[int], device: torch.device) -> torch.Tensor:
    """Return one int32 key per token, [sum(lengths)]; ``ordinals`` number a trial's examples in the order
    it sees them."""
    starts = [_int32((seed * 0x27D4EB2F) ^ (ordinal * 0x165667B1)) for ordinal in ordinals]
    rows = mix(torch.tensor(starts, dtype=torch.int32, device=device))
    positions = torch.cat([torch.arange(length, dtype=torch.int32, device=device) for length in lengths])
    repeats = torch.tensor(lengths, device=device)
    return mix(rows.repeat_interleave(repeats, output_size=sum(lengths)) + positions * _int32(GOLDEN))


def kept(key_T: torch.Tensor, threshold_T: torch.Tensor, layer: int, width: int) -> torch.Tensor:
    """Return the mask of elements that stay, bool [T, width], for one adapted layer.

    Token and feature keys are well mixed already: their product needs one round more, not three.
    """
    features = mix(torch.arange(width, dtype=torch.int32, device=key_T.device) + _int32(layer * GOLDEN))
    h = key_T[:, None] * features.bitwise_or_(1)[None, :]
    return h.bitwise_xor_(h >> 15).mul_(_int32(0x2C1B3C6D)) >= threshold_T[:, None]


def threshold(probability: float) -> int:
    """Return the int32 below which a hash drops its element."""
    return int(probability * 2**32) - 2**31
