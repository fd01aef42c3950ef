"""Causal attention over concatenated rows, as an attention function of transformers. It computes no padding.

Uses PyTorch's variable-length kernel on CUDA in half precision (by count 5 of 397 ms of a pass:
`python -m tests.benchmarks.predict 8B`), `block_attention` for short rows on a CPU (a third less time in
bfloat16), and otherwise one scaled_dot_product_attention per row. Capped scores (Gemma 2) and sinks (gpt-oss)
are computed row by row and need a [heads, length, length] matrix: no kernel of PyTorch 2.11 to 2.13 has them.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from lora_search.ops.block_attention import LONGEST_ROW, RowAttention

NAME = "lora_search_rows"
BOUNDARIES = ("cu_seq_lens_q", "max_length_q", "cu_seq_lens_k", "max_length_k", "key_source")
# PyTorch 2.12 and later need a flag when key and value have fewer heads (pytorch pull request 179468).
TAKES_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters
FEWER_KEY_HEADS: dict[str, Any] = {"enable_gqa": True} if TAKES_FLAG else {}


def rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int = 0,
    key_source: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Return [1, T, heads, width] for query [1, heads, T, width]; key and value may have fewer heads.

    ``cu_seq_lens_q`` int32 [rows + 1] holds the row boundaries. Where rows share their first tokens,
    ``key_source`` [K] maps each key to its token and ``cu_seq_lens_k`` holds their boundaries; the last query
    of a row sees all its keys. ``s_aux`` [heads] holds sinks: scores of a further key without a value.
    transformers passes more keywords; `packing_check` verifies at load time that none of them matters to the
    base.
    """
    if cu_seq_lens_q is None:
        raise ValueError("its decoder does not pass the row boundaries to its attention layers.")
    if key_source is None or cu_seq_lens_k is None:
        cu_seq_lens_k, max_length_k = cu_seq_lens_q, max_length_q
    else:
        key, value = key.index_select(2, key_source), value.index_select(2, key_source)
    is_usual = softcap is None and s_aux is None
    if is_usual and _fits_kernel(query, value):
        bounds, longest = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
        return kernel(query, key, value, bounds, longest, scaling, sliding_window), None
    lengths, key_lengths = (tuple(bounds.diff().tolist()) for bounds in (cu_seq_lens_q, cu_seq_lens_k))
    is_plain = is_usual and (sliding_window is None or max_length_k <= sliding_window)
    is_square = query.shape[-1] == value.shape[-1]  # not so in DeepSeek's latent attention
    if is_plain and is_square and not query.is_cuda and max_length_k <= LONGEST_ROW:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return RowAttention.apply(query, key, value, lengths, key_lengths, scale), None  # type: ignore[no-untyped-call]
    keys = (key.split(key_lengths, 2), value.split(key_lengths, 2))
    rows = zip(query.split(lengths, 2), *keys, strict=True)
    if is_usual:
        outputs = [_one_row(q, k, v, scaling, sliding_window) for q, k, v in rows]
    else:
        outputs = [_written_out(q, k, v, scaling, sliding_window, softcap, s_aux) for q, k, v in rows]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Run PyTorch's variable-length kernel on all rows at once; bounds and longest are (queries, keys)."""
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # the backward of [0] is a copy
    packed = varlen_attn(q, k, v, *bounds, *longest, scale=scaling, window_size=window, **FEWER_KEY_HEADS)
    assert isinstance(packed, torch.Tensor)
    return packed.unsqueeze(0)


def _fits_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether varlen_attn fits: CUDA, half precision, one head width, a multiple of 8 to 256."""
    half, width = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    return query.is_cuda and half and width == value.shape[-1] <= 256 and width % 8 == 0


def _one_row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    length, enable_gqa = k.shape[2], q.shape[1] != k.shape[1]
    if q.shape[2] == length and (sliding_window is None or length <= sliding_window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=enable_gqa)
    visible = _visible(q.shape[2], length, sliding_window or length, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling, enable_gqa=enable_gqa)


def _written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with scores softcap * tanh(score / softcap), before the mask (Gemma 2, arXiv 2408.00118), or
    a softmax with one more score in each head (gpt-oss, arXiv 2508.10925)."""
    length, queries_per_key = k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(queries_per_key, 1), v.repeat_interleave(queries_per_key, 1)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = ~_visible(q.shape[2], length, sliding_window or length, q.device)
    scores = scores.float().masked_fill(hidden, float("-inf"))
    if sinks is None:
        return scores.softmax(-1).to(v.dtype) @ v
    column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1].to(v.dtype) @ v


def _visible(num_queries: int, num_keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Return a [queries, keys] mask: a query sees itself and at most ``window`` - 1 keys before it. The
    queries are the last tokens of the row."""
    position = torch.arange(num_keys, device=device)
    distance = position[num_keys - num_queries :, None] - position[None, :]
    return (distance >= 0) & (distance < window)


# No mask function: with one, transformers would detect packed rows itself and synchronise on every pass.
AttentionInterface.register(NAME, rows_attention)
