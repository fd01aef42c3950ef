"""A base over several devices: the decoder's layers in order, everything else (embedding, norm, head) on the
last device, where a pass begins and ends. So tied weights stay together, and one copy of the hidden states
crosses each border. The devices work one after the other.

transformers and accelerate load each weight straight to its device. accelerate's hooks, one for every module,
are taken off: a hook at each layer brings its inputs, and what is in them only once to each device.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from lora_search.ops.recompute import decoder_layers
from lora_search.settings.rules import require

PACKED_SHARE = 0.26  # of a layer's bytes that nf4 with double quantization leaves: 4.13 of 16 bits


def device_map(
    outline: PreTrainedModel, devices: Sequence[torch.device], is_packed: bool = False
) -> dict[str, torch.device]:
    """Return transformers' device_map: module -> device, about the same bytes of weights on each.

    Raises ConfigError where the base has fewer layers than there are devices."""
    layers = decoder_layers(outline.base_model)
    rule = f"must be at most {len(layers)}, the decoder layers of the base"
    require(len(devices) <= len(layers), "engine.devices_per_worker", len(devices), rule, "Lower it")
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    rest = sum(p.numel() for p in outline.parameters()) - sum(sizes)
    shares = [size * (PACKED_SHARE if is_packed else 1.0) for size in sizes]
    names = {module: name for name, module in outline.named_modules()}
    above = {names[layers[0]].rsplit(".", depth)[0] for depth in range(1, names[layers[0]].count(".") + 1)}
    places = {
        name: devices[-1]
        for name in names.values()
        if name and name not in above and name.rpartition(".")[0] in {"", *above}
    }
    split = split_evenly(shares, rest, len(devices))
    return places | {names[layer]: devices[place] for layer, place in zip(layers, split, strict=True)}


def split_evenly(sizes: Sequence[float], rest: float, count: int) -> list[int]:
    """Return each layer's device, in order, for about the same size on each; ``rest`` is on the last."""
    share = (sum(sizes) + rest) / count
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    fair = [min(int(middle / share), count - 1) for middle in middles]
    spare = len(sizes) - count  # every device gets a layer
    return [max(min(place, i), i - spare) for i, place in enumerate(fair)]


def bring_inputs(model: PreTrainedModel) -> None:
    """Have each decoder layer bring its inputs to its device."""
    remove_hook_from_module(model, recurse=True)
    copies = WeakIdKeyDictionary()
    for layer in decoder_layers(model.base_model):
        hook = partial(_bring_all, next(layer.parameters()).device, copies)
        layer.register_forward_pre_hook(hook, with_kwargs=True)


def describe_split(model: PreTrainedModel) -> str:
    """Return the devices in words, with how many layers each has; "" for a single one."""
    layers = decoder_layers(model.base_model)
    counts = Counter(str(next(layer.parameters()).device) for layer in layers)
    *_, last = texts = [f"{device} ({count} layers)" for device, count in counts.items()]
    return ", ".join([*texts[:-1], last.replace(")", " and the rest)")]) if len(texts) > 1 else ""


def _bring_all(
    device: torch.device, copies: Any, _layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, Any]:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton launches
    return _bring(args, device, copies), _bring(named, device, copies)


def _bring(value: Any, device: torch.device, copies: Any) -> Any:
    """Return the value with its tensors on the device; of constants, one copy serves all layers there."""
    if isinstance(value, tuple | list):
        return type(value)(_bring(part, device, copies) for part in value)
    if isinstance(value, dict):
        value.update(
            {key: _bring(part, device, copies) for key, part in value.items()}
        )  # layers may share it
        return value
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    if value.requires_grad:
        return value.to(device, non_blocking=True)
    known = copies.setdefault(value, {})
    if device not in known:
        known[device] = value.to(device, non_blocking=True)
    return known[device]
