"""Changes to a freshly loaded model that packed passes need; its numbers stay as they are."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_search.ops.attention import BOUNDARIES
from lora_search.ops.recompute import decoder_layers
from lora_search.ops.row_scans import keep_rows_apart

KEEP_KEYWORDS = ("stablelm", "nemotron")  # their decoder layers call their attention without the keywords


def adapt(model: PreTrainedModel) -> None:
    """Change the model in place."""
    keep_rows_apart(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is Conv1D:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _as_linear(layer))
    if model.config.model_type in KEEP_KEYWORDS:
        for layer in decoder_layers(model.base_model):
            _hand_on_boundaries(layer)


def _as_linear(layer: Conv1D) -> nn.Linear:
    """Return GPT-2's layer, whose weight is transposed, as a linear layer over the same memory."""
    linear = nn.Linear(layer.nx, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T, requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear


def _hand_on_boundaries(layer: nn.Module) -> None:
    """Give the layer's attention the row boundaries that the layer gets."""
    held: dict[str, Any] = {}

    def hold(_layer: nn.Module, _args: object, keywords: dict[str, Any]) -> None:
        held.clear()
        held.update({name: keywords[name] for name in BOUNDARIES if name in keywords})

    def hand_on(
        _attention: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, keywords | held

    layer.register_forward_pre_hook(hold, with_kwargs=True)
    layer.get_submodule("self_attn").register_forward_pre_hook(hand_on, with_kwargs=True)
