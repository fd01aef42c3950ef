"""The layers of a model that carry adapters, by PEFT's rule for names."""

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_search.errors import ModelError
from lora_search.files.peft import pattern_key, refused_by_peft, taken_by_experts
from lora_search.settings.schema import ALL_LINEAR
from lora_search.trial import LAYERS, MODULES, PATTERN

READ_BIAS = "dt_proj"  # by Mamba, Falcon-Mamba and Jamba, whose step sizes it makes


def target_layers(model: PreTrainedModel, target_modules: Sequence[str]) -> dict[str, nn.Linear]:
    """Return full name -> layer, in model order, for targets as TrialSettings has them. The output head
    carries no adapter, nor do routers and what PEFT would give to other layers."""
    modules = _text_modules(model)
    linear = _plain_linear(model)
    if not linear:
        raise ModelError(
            f"lora.target_modules: adapters go on linear layers, and this {model.config.model_type} model "
            f"has none: its layers are {_layer_kinds(modules)}. Choose another base."
        )
    taken = taken_by_experts(model, {_last(name) for name in linear})
    for target in target_modules:
        if target == ALL_LINEAR:
            unfit = taken | refused_by_peft(model, {_last(name) for name in linear})
            linear = {name: layer for name, layer in linear.items() if _last(name) not in unfit}
        elif target.startswith(LAYERS):
            _check_layers(target, linear)
        else:
            _check_target(target, model, modules, linear)
        if _last(target) in taken or _takes(target, linear, taken):
            what = f"in PEFT {in_words([target])} of a {model.config.model_type} model means its experts"
            left = ", ".join(sorted({_last(name) for name in linear} - taken))
            raise ModelError(
                f"lora.target_modules: {what}, which have no linear layers: an adapter trained here "
                f"could not be loaded there. Choose among: {left}; or all-linear."
            )
    return {name: layer for name, layer in linear.items() if matches(name, target_modules)}


def in_words(target_modules: Sequence[str]) -> str:
    """Return targets, which are as TrialSettings has them, for a message."""
    limits = [target.removeprefix(LAYERS) for target in target_modules if target.startswith(LAYERS)]
    names = [
        f"the regular expression {name.removeprefix(PATTERN)!r}" if name.startswith(PATTERN) else repr(name)
        for name in target_modules
        if not name.startswith(LAYERS)
    ]
    return " in layers ".join([", ".join(names), *limits])


def left_out(model: PreTrainedModel) -> list[str]:
    """Return the last names of linear layers that all-linear leaves out, though PEFT's has them."""
    linear = _all_linear(model)
    return sorted({_last(name) for name in linear} - {_last(n) for n in target_layers(model, (ALL_LINEAR,))})


def _text_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules by full name, without those of images and sound, whose weights text never meets."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    start = next((name for name, module in model.named_modules() if module is decoder), "")
    return {
        name: module
        for name, module in model.named_modules()
        if module is head or f"{name}.".startswith(f"{start}." if start else "")
    }


def _all_linear(model: PreTrainedModel) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def _plain_linear(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Leave out what a model made of a linear layer, as Phi-MoE its router, which returns more than x W."""
    texts = _text_modules(model)
    return {
        name: layer for name, layer in _all_linear(model).items() if name in texts and _gives_tensor(layer)
    }


@torch.no_grad()
def _gives_tensor(layer: nn.Linear) -> bool:
    if type(layer).forward is nn.Linear.forward or not type(layer).__module__.startswith(
        "transformers.models."
    ):
        return True
    return isinstance(layer(layer.weight.new_zeros(1, 1, layer.in_features)), torch.Tensor)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _takes(target: str, linear: dict[str, nn.Linear], taken: set[str]) -> bool:
    """Return whether a regular expression matches layers that PEFT would give to others."""
    return target.startswith(PATTERN) and any(_last(n) in taken for n in linear if matches(n, (target,)))


def matches(name: str, target_modules: Sequence[str]) -> bool:
    """Return whether a linear layer matches by PEFT's rule: its full name, the end of it or a regular
    expression; and its number in the decoder is among those that limit the targets."""
    limits = [target for target in target_modules if target.startswith(LAYERS)]
    if any(layer_number(name) not in _numbers(limit) for limit in limits):
        return False
    return any(_matches(name, target) for target in target_modules if target not in limits)


def _matches(name: str, target: str) -> bool:
    if target.startswith(PATTERN):
        return re.fullmatch(target.removeprefix(PATTERN), name) is not None
    return target == ALL_LINEAR or name == target or name.endswith(f".{target}")


def layer_number(name: str) -> int | None:
    """Return the number of the decoder layer that a module belongs to: as in PEFT, the first in its name."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", f".{name}")
    return int(found[1]) if found else None


def _numbers(limit: str) -> set[int]:
    return {int(number) for number in limit.removeprefix(LAYERS).split(",")}


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise ModelError if a name of lora.rank_pattern or lora.alpha_pattern ends none of these layers."""
    for end in patterns:
        if not any(pattern_key([end], name) == end for name in names):
            there = ", ".join(sorted({_last(name) for name in names}))
            raise ModelError(
                f"lora.rank_pattern, lora.alpha_pattern: no adapted layer's name ends in {end!r}. "
                f"There are: {there}."
            )


def check_biases(model: PreTrainedModel, targets: Sequence[tuple[str, ...]]) -> None:
    """Raise ModelError where lora.bias would train nothing: none of the layers that trials adapt has a bias,
    or the model reads it past them."""
    layers = {name: layer for names in targets for name, layer in target_layers(model, names).items()}
    read = [name for name, layer in layers.items() if _last(name) == READ_BIAS and layer.bias is not None]
    if read:
        raise ModelError(
            f"lora.bias: this {model.config.model_type} model takes the bias of {READ_BIAS} past the layer, "
            f"so a trial's own would do nothing. Set lora.bias=none, or adapt layers without {READ_BIAS}."
        )
    if layers and all(layer.bias is None for layer in layers.values()):
        raise ModelError(
            f"lora.bias: no layer of {in_words(targets[0])} has a bias in this {model.config.model_type} "
            "model. Set lora.bias=none, or adapt layers that have one."
        )


def exact_targets(names: Sequence[str], module_names: Sequence[str]) -> list[str] | str:
    """Return the shortest target_modules with which PEFT selects exactly these layers: the last parts of
    their names, their full names, or a regular expression."""
    wanted = set(names)
    for targets in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in module_names if matches(name, targets)} == wanted:
            return targets
    return "|".join(re.escape(name) for name in sorted(names))


def _check_target(
    target: str, model: PreTrainedModel, modules: dict[str, nn.Module], linear: dict[str, nn.Linear]
) -> None:
    found = [name for name in modules if matches(name, (target,))]
    if not found:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        is_pattern, said = target.startswith(PATTERN), target.removeprefix(PATTERN)
        none = (
            f"no layer's full name matches the regular expression {said!r}"
            if is_pattern
            else (f"the model has no layer {said!r}")
        )
        raise ModelError(f"lora.target_modules: {none}. There are: {there}; or all-linear.")
    unfit = next((name for name in found if name not in linear), None)
    if unfit is not None:
        kind = type(modules[unfit]).__name__
        raise ModelError(
            f"lora.target_modules: {unfit} is a {kind}; adapters go on linear layers of the decoder only."
            f"{_whole(model, modules[unfit])}"
        )


def _whole(model: PreTrainedModel, module: nn.Module) -> str:
    """Return what trains that module, where something does."""
    own = dict(zip(MODULES, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True))
    name = next((name for name, known in own.items() if known is module), None)
    return f" lora.modules_to_save=[{name}] trains the whole of it." if name else ""


def _check_layers(limit: str, linear: dict[str, nn.Linear]) -> None:
    there = {number for name in linear if (number := layer_number(name)) is not None}
    missing = sorted(_numbers(limit) - there)
    if missing:
        listed = ", ".join(map(str, missing))
        raise ModelError(
            f"lora.layers_to_transform: the model has no layer {listed}. Its layers are 0 to {max(there)}."
        )


def _layer_kinds(modules: dict[str, nn.Module]) -> str:
    """Return the types of the other layers with a weight matrix."""
    plain = (nn.Embedding, nn.Linear)
    weights = {name: getattr(m, "weight", None) for name, m in modules.items() if not isinstance(m, plain)}
    matrices = [name for name, w in weights.items() if isinstance(w, torch.Tensor) and w.dim() == 2]
    return ", ".join(sorted({type(modules[name]).__name__ for name in matrices})) or "of a kind of their own"
