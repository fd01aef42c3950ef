"""Checks at load that packed passes compute a base correctly, against the model's own attention.

An architecture may keep state between tokens, add its own bias to the scores, look ahead, or scale its logits
in a way that packed passes do not support. Two short rows, end to end, reveal that: in a few milliseconds on
a small model, in two short passes on a large one. The weights are not copied.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_search.errors import ModelError
from lora_search.ops.attention import NAME as ATTENTION

ROW_TOKENS, NUM_ROWS = 8, 2
SHORT_WINDOW = 3  # tokens; windows and chunks are shortened to it, so that they affect short rows
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # of logits; Granite divides
WINDOWS = ("sliding_window", "attention_chunk_size")
LOOSEST_QUARTER = 0.75  # rounding in bfloat16 may route single tokens to other experts; most must agree
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # relative, per token
REMEDY = "Choose a decoder-only model with standard attention, such as Llama, Qwen, Mistral, Gemma or Phi."
FAILURES = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Bend:
    """What a model does to the logits of its head: scale them, then cap them."""

    scale: float = 1.0  # Granite, Cohere
    softcap: float | None = None  # Gemma 2


def bend_of(model: PreTrainedModel) -> Bend:
    config = model.config.get_text_config()
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale *= divisor if config.model_type.startswith("hyperclovax") else 1 / divisor
    return Bend(scale, getattr(config, "final_logit_softcapping", None))


def output_head(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from hidden states to logits."""
    output: nn.Module = model.get_output_embeddings()
    scale, cap = bend_of(model).scale, bend_of(model).softcap
    if cap is None:
        return lambda hidden: output(hidden) * scale
    return lambda hidden: torch.tanh(output(hidden) * scale / cap) * cap


def check_packing(model: PreTrainedModel, path: str) -> None:
    """Raise ModelError unless packed rows give the same logits as each row alone."""
    kind = f"model.path: {path} is a {model.config.model_type} model ({type(model).__name__})"
    try:
        error = _relative_error(model)
    except FAILURES as failure:
        reason = str(failure).strip().partition("\n")[0] or type(failure).__name__
        raise ModelError(f"{kind}, which packed passes cannot run: {reason} {REMEDY}") from None
    tolerance = TOLERANCE.get(model.dtype, 0.1)
    if math.isnan(error):
        what = "gives logits that are no numbers, or all of them 0"
        raise ModelError(f"{kind} that {what}: its weights are damaged. Fetch them again.")
    if not error <= tolerance:
        found = f"logits are off by {error:.2g} (relative; up to {tolerance:g} is rounding)"
        raise ModelError(f"{kind}, which packed passes compute incorrectly: {found}. {REMEDY}")


@torch.no_grad()
def _relative_error(model: PreTrainedModel) -> float:
    """Return the larger error of the two rows, without the worst quarter of each row's tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    start_R1 = torch.arange(NUM_ROWS, device=model.device)[:, None] * 5 + 3
    rows = (start_R1 + 7 * torch.arange(ROW_TOKENS, device=model.device)) % vocabulary
    with _short_windows(model):
        with _linear_layers_watched(model, rows.numel()):
            packed = _packed_logits(model, rows).float()
        with _own_attention(model):
            alone = torch.stack([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    error = (packed - alone).norm(dim=-1) / alone.float().norm(dim=-1)
    return float(error.quantile(LOOSEST_QUARTER, dim=1).max())


def _packed_logits(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Return [rows, tokens, vocabulary], computed as `packed_model` does."""
    decoder: nn.Module = model.base_model
    position = torch.arange(ROW_TOKENS, device=model.device).repeat(NUM_ROWS)
    bounds = torch.arange(0, rows.numel() + 1, ROW_TOKENS, device=model.device, dtype=torch.int32)
    output = decoder(
        input_ids=rows.reshape(1, -1),
        position_ids=position[None],
        use_cache=False,
        cu_seq_lens_q=bounds,
        max_length_q=ROW_TOKENS,
    )
    return output_head(model)(output.last_hidden_state[0]).view(*rows.shape, -1)


@contextlib.contextmanager
def _linear_layers_watched(model: PreTrainedModel, num_tokens: int) -> Iterator[None]:
    """Raise ValueError if a linear layer gets only some of the tokens, as an expert does: a token's place in
    the pass determines its adapter."""

    def look(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs and inputs[0].numel() != num_tokens * inputs[0].shape[-1]:
            raise ValueError(f"its layer {names[layer]} does not get every token of a pass.")

    head = model.get_output_embeddings()
    names: dict[nn.Module, str] = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    hooks = [layer.register_forward_pre_hook(look) for layer in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION)


@contextlib.contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten the windows and chunks of configuration and layers to a few tokens."""
    holders = [model.config, model.config.get_text_config(), *model.modules()]
    found = [(holder, name, getattr(holder, name, None)) for holder in holders for name in WINDOWS]
    lengths = [(holder, name, length) for holder, name, length in found if isinstance(length, int)]
    for holder, name, _ in lengths:
        setattr(holder, name, SHORT_WINDOW)
    try:
        yield
    finally:
        for holder, name, length in lengths:
            setattr(holder, name, length)
