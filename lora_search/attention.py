"""Causal attention over rows laid end to end, as an attention function of transformers. No pad token is
ever computed.

On CUDA PyTorch's variable-length kernel, on the CPU one scaled_dot_product_attention per row.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lora_search.row_attention import LONGEST_ROW, RowAttention

NAME = "lora_search_rows"


def rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Return [1, T, heads, width] for query [1, heads, T, width]; key and value may have fewer heads.

    ``cu_seq_lens_q`` int32 [rows + 1] holds the row boundaries. transformers passes keywords that do not
    matter here.
    """
    assert cu_seq_lens_q is not None, "the engine passes the row boundaries"
    if query.is_cuda:
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        gqa = query.shape[1] != key.shape[1]
        bounds, longest = cu_seq_lens_q, max_length_q
        packed = varlen_attn(
            q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=gqa
        )
        assert isinstance(packed, torch.Tensor)
        return packed.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    if torch.is_grad_enabled() and sliding_window is None and max_length_q <= LONGEST_ROW:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return RowAttention.apply(query, key, value, lengths, scale), None  # type: ignore[no-untyped-call]
    rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [_one_row(q, k, v, scaling, sliding_window) for q, k, v in rows]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _one_row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    length, enable_gqa = q.shape[2], q.shape[1] != k.shape[1]
    if sliding_window is None or length <= sliding_window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=enable_gqa)
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance < sliding_window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling, enable_gqa=enable_gqa)


def _no_mask(*_: object, **__: object) -> None:
    """Row boundaries and causality are the attention function's own business."""


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, _no_mask)
