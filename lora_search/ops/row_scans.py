"""Convolutions and scans of hybrid models over packed rows: each row on its own, from an empty state, between
matmuls over all tokens.

transformers has them as functions in a model's module, with the row boundaries among their keywords. Without
kernels that keep rows apart it ignores these or refuses; here each function is called once for each row.
"""

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

# function -> axis of the tokens, and the arguments that have it: by place, by name
ALONG_TOKENS: dict[str, tuple[int, tuple[int, ...], tuple[str, ...]]] = {
    "causal_conv1d_fn": (2, (0,), ()),
    "mamba2_chunk_scan": (1, (0, 1, 3, 4), ()),
    "torch_chunk_gated_delta_rule": (1, (0, 1, 2), ("g", "beta")),
}


def keep_rows_apart(model: nn.Module) -> None:
    """Replace these functions in the modules of transformers that the model is made of."""
    for modeling in {sys.modules[type(module).__module__] for module in model.modules()}:
        for name in ALONG_TOKENS:
            original = getattr(modeling, name, None)
            if original is not None and not isinstance(original, partial):
                setattr(modeling, name, partial(_row_after_row, original, name))


def _row_after_row(original: Callable[..., Any], name: str, *args: Any, **named: Any) -> Any:
    bounds, others = named.pop("cu_seq_lens_q", None), named.pop("cu_seqlens", None)
    bounds = others if bounds is None else bounds
    if bounds is None:
        return original(*args, **named)
    if named.get("key_source") is not None:
        raise RuntimeError("rows with state between tokens cannot share their beginning")
    axis, places, names = ALONG_TOKENS[name]
    lengths = _lengths(bounds)
    cut = {place: args[place].split(lengths, axis) for place in places}
    cut_named = {key: named[key].split(lengths, axis) for key in names}
    outputs = []
    for row in range(len(lengths)):
        own = [cut[place][row] if place in cut else value for place, value in enumerate(args)]
        outputs.append(original(*own, **named | {key: parts[row] for key, parts in cut_named.items()}))
    if isinstance(outputs[0], tuple):  # the second is the last state, which training does not ask for
        return torch.cat([output for output, _ in outputs], axis), None
    return torch.cat(outputs, axis)


@lru_cache(maxsize=1)  # all layers of a pass ask for the same, and a GPU is waited for
def _lengths(bounds: torch.Tensor) -> tuple[int, ...]:
    return tuple(bounds.diff().tolist())
