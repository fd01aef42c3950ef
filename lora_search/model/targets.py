"""The layers of a model that carry adapters, by PEFT's rule for names."""

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_search.errors import ModelError
from lora_search.settings.schema import ALL_LINEAR


def target_layers(model: PreTrainedModel, target_modules: Sequence[str]) -> dict[str, nn.Linear]:
    """Return full name -> layer, in model order, for target names as in PEFT; the output head carries no
    adapter."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    linear = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
    if not linear:
        raise ModelError(
            f"lora.target_modules: adapters go on linear layers, and this {model.config.model_type} model "
            f"has none: its layers are {_layer_kinds(modules)}. Choose another base."
        )
    if tuple(target_modules) == (ALL_LINEAR,):
        return linear
    for target in target_modules:
        _check_target(target, modules, linear)
    return {name: layer for name, layer in linear.items() if matches(name, target_modules)}


def matches(name: str, target_modules: Sequence[str]) -> bool:
    """Return whether a linear layer matches by PEFT's rule: its full name or the end of it."""
    if tuple(target_modules) == (ALL_LINEAR,):
        return True
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def exact_targets(names: Sequence[str], module_names: Sequence[str]) -> list[str] | str:
    """Return the shortest target_modules with which PEFT selects exactly these layers: the last parts of
    their names, their full names, or a regular expression."""
    wanted = set(names)
    for targets in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in module_names if matches(name, targets)} == wanted:
            return targets
    return "|".join(re.escape(name) for name in sorted(names))


def _check_target(target: str, modules: dict[str, nn.Module], linear: dict[str, nn.Linear]) -> None:
    found = [name for name in modules if matches(name, (target,))]
    if not found:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ModelError(
            f"lora.target_modules: the model has no layer {target!r}. There are: {there}; or all-linear."
        )
    unfit = next((name for name in found if name not in linear), None)
    if unfit is not None:
        kind = type(modules[unfit]).__name__
        raise ModelError(
            f"lora.target_modules: {unfit} is a {kind}; adapters go on linear layers of the decoder only."
        )


def _layer_kinds(modules: dict[str, nn.Module]) -> str:
    """Return the types of the other layers with a weight matrix."""
    plain = (nn.Embedding, nn.Linear)
    weights = {name: getattr(m, "weight", None) for name, m in modules.items() if not isinstance(m, plain)}
    matrices = [name for name, w in weights.items() if isinstance(w, torch.Tensor) and w.dim() == 2]
    return ", ".join(sorted({type(modules[name]).__name__ for name in matrices})) or "of a kind of their own"
