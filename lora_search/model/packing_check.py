"""At load, finds how passes can run a base so that they give its own numbers: packed, or else row by row.

An architecture may keep state between tokens, add its own bias to the scores, look ahead, or scale its logits
in a way that packed passes do not support. A few short rows, end to end, reveal that: in milliseconds on a
small model, in a few short passes on a large one. The weights are not copied. What is wrong packed is tried
row by row: each row alone through the model's own forward and attention, slower.
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

ROW_TOKENS, NUM_ROWS = 8, 4
SHORT_WINDOW = 3  # tokens; windows and chunks are shortened to it, so that they affect short rows
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # of logits; Granite divides
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # of logits
WINDOWS = ("sliding_window", "attention_chunk_size", "keep_window_size", "index_topk", "floor_scale")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}  # relative, per token
REMEDY = "Choose a decoder-only model with standard attention, such as Llama, Qwen, Mistral, Gemma or Phi."
ALONE = "_rows_run_alone"
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
    caps = (getattr(config, name, None) for name in CAPS)
    return Bend(scale, next((cap for cap in caps if cap is not None), None))


def output_head(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from hidden states to logits."""
    output: nn.Module = model.get_output_embeddings()
    scale, cap = bend_of(model).scale, bend_of(model).softcap
    if cap is None:
        return lambda hidden: output(hidden) * scale
    return lambda hidden: torch.tanh(output(hidden) * scale / cap) * cap


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return what gives the hidden states that the output head reads."""
    base: nn.Module = model.base_model
    return getattr(model, "model", base) if base is model else base


def runs_row_by_row(model: PreTrainedModel) -> bool:
    """Return whether each row of a pass runs alone, as `check_packing` found to be needed."""
    return getattr(model, ALONE, False)


def own_attention(model: PreTrainedModel) -> str:
    return "sdpa" if model._supports_sdpa else "eager"


def check_packing(model: PreTrainedModel, path: str) -> None:
    """Leave the model as passes run it right: packed, or else row by row (`runs_row_by_row`).

    Raises ModelError if neither gives the logits of the model's own forward pass."""
    kind = f"model.path: {path} is a {model.config.model_type} model ({type(model).__name__})"
    setattr(model, ALONE, False)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(ATTENTION)
        packed = _fault(model, kind)
    else:
        packed = "cannot run: its attention is written out in its layers"
    if packed is None:
        return
    setattr(model, ALONE, True)
    model.set_attn_implementation(own_attention(model))
    alone = _fault(model, kind)
    if alone is not None:
        raise ModelError(f"{kind}, which packed passes {packed}, and passes row by row {alone}. {REMEDY}")


def _fault(model: PreTrainedModel, kind: str) -> str | None:
    """Return what passes do wrong, None if their logits are right; ModelError if they are no numbers."""
    try:
        error = _relative_error(model)
    except FAILURES as failure:
        reason = str(failure).strip().partition("\n")[0] or type(failure).__name__
        return f"cannot run: {reason.rstrip('. ')}"
    tolerance = TOLERANCE.get(model.dtype, 0.1)
    if math.isnan(error):
        what = "gives logits that are no numbers, or all of them 0"
        raise ModelError(f"{kind} that {what}: its weights are damaged. Fetch them again.")
    if error <= tolerance:
        return None
    return f"compute incorrectly: logits are off by {error:.2g} (relative; up to {tolerance:g} is rounding)"


@torch.no_grad()
def _relative_error(model: PreTrainedModel) -> float:
    """Return the `_largest` error of the logits. Raise ValueError if the model looks ahead."""
    vocabulary = model.config.get_text_config().vocab_size
    start_R1 = torch.arange(NUM_ROWS, device=model.device)[:, None] * 5 + 3
    rows = (start_R1 + 7 * torch.arange(ROW_TOKENS, device=model.device)) % vocabulary
    with _short_windows(model):
        passes = list(rows.split(1)) if runs_row_by_row(model) else [rows]
        with _linear_layers_watched(model, passes[0].numel()):
            found = torch.cat([_logits_of_pass(model, part) for part in passes])
        with _eager(model):
            own, half = (_own_logits(model, part) for part in (rows, rows[:, : ROW_TOKENS // 2]))
    if _largest(half, own[:, : ROW_TOKENS // 2]) > TOLERANCE.get(model.dtype, 0.1):
        raise ValueError("a token's logits depend on later tokens.")
    return _largest(found, own)


def _largest(found_RTV: torch.Tensor, own_RTV: torch.Tensor) -> float:
    """Return the largest relative error of a token's logits. In 16 bits, where rounding may route single
    tokens to other experts, the largest that most rows have at a place: what leaks from a row into the next
    is wrong in all rows but the first."""
    error_RT = (found_RTV.float() - own_RTV.float()).norm(dim=-1) / own_RTV.float().norm(dim=-1)
    is_exact = own_RTV.dtype == torch.float32
    return float((error_RT if is_exact else error_RT[1:].median(dim=0).values).max())


def _own_logits(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Return [rows, tokens, vocabulary] by the model's own forward, each row alone."""
    return torch.cat([model(input_ids=row, use_cache=False).logits for row in rows.split(1)])


def _logits_of_pass(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Return [rows, tokens, vocabulary], computed as `packed_model` does."""
    if runs_row_by_row(model):
        output = decoder_of(model)(input_ids=rows, use_cache=False)
    else:
        position = torch.arange(ROW_TOKENS, device=model.device).repeat(NUM_ROWS)
        bounds = torch.arange(0, rows.numel() + 1, ROW_TOKENS, device=model.device, dtype=torch.int32)
        output = decoder_of(model)(
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
def _eager(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
