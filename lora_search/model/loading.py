"""Loads the frozen base and its tokenizer, once per worker.

A base that cannot be loaded completely, that packed passes compute incorrectly, or that cannot carry adapters
is one ModelError.
"""

import importlib.util
import json
import logging
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_search.errors import ConfigError, LoraSearchError, ModelError
from lora_search.model.adaptation import adapt
from lora_search.model.checks import DAMAGED, check_unexpected
from lora_search.model.packing_check import check_packing
from lora_search.model.placement import bring_inputs, device_map
from lora_search.model.sources import check_missing, find_source, location, pinned
from lora_search.ops.device import keep_freed_memory, keep_to_own_cores, pick_devices, pick_dtype
from lora_search.settings.schema import EngineConfig, ModelConfig

T = TypeVar("T")
UNREADABLE = (SafetensorError, struct.error, json.JSONDecodeError, pickle.UnpicklingError)
NO_TOKENIZER = "It has no tokenizer.json: save the tokenizer with the model."
UNTRAINED = 1e-16  # bfloat16 noise of an initialisation is far above
REMEDIES = {  # part of transformers' message -> remedy
    "trust_remote_code": "If you trust its author, set model.trust_remote_code=true.",
    "backend tokenizer": NO_TOKENIZER,
    "Unrecognized configuration class": "It is not a causal language model: choose a decoder-only one.",
    "does not recognize this architecture": "Choose another base, or update transformers.",
    "not a valid JSON file": DAMAGED,
    "GGUF magic": DAMAGED,
    "cannot reshape array": DAMAGED,
    "cannot mmap an empty file": DAMAGED,
    "out of memory": "Choose a smaller base, another engine.device, or model.quantization=nf4.",
    "Weights only load failed": "Its weights contain code, which is never executed: use .safetensors files.",
}


@dataclass(frozen=True)
class Base:
    """The frozen model in evaluation mode, on its device, with the packed attention in place."""

    model: PreTrainedModel
    source: str
    device: torch.device
    dtype: torch.dtype


def resolve_model(config: ModelConfig) -> str:
    """Return a local folder or a hub id; packaged and GGUF models are converted into the cache first."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return _explained(config, lambda: find_source(config))


def pin_model(source: str, config: ModelConfig, commit: str | None = None) -> ModelConfig:
    """Return the settings to load a resolved model with: a hub id gets its commit as revision.

    ``commit`` is the one that the study was started with."""
    return _explained(config, lambda: pinned(source, config, commit))


def load_tokenizer(source: str, config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a resolved model; its length limit is at most the model's."""
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source, config)
    longest = max_positions(_from_pretrained(AutoConfig, source, config))
    if longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest row the model can read, if its configuration says so.

    If the rotary frequencies depend on the longest row of a pass (longrope, dynamic), a longer row would
    change its neighbours: then it is the length up to which the frequencies are fixed.
    """
    text = config.get_text_config()
    longest: int | None = getattr(text, "max_position_embeddings", None)
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        return rope.get("original_max_position_embeddings", longest)
    return longest


def load_outline(source: str, config: ModelConfig) -> PreTrainedModel:
    """Return the model on the meta device: names and shapes of its layers, without weights.

    The weights of a local folder are compared with its configuration, by their headers. From the hub, only
    the configuration is downloaded.
    """
    place = location(source, config)
    written = _from_pretrained(AutoConfig, source, config)
    if Path(place).is_dir() and getattr(written, "quantization_config", None) is None:
        model, found = _from_pretrained(
            AutoModelForCausalLM,
            source,
            config,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the names
        )
        _check_whole(config, model, found)
    else:
        with torch.device("meta"):
            model = _explained(
                config,
                lambda: AutoModelForCausalLM.from_config(written, trust_remote_code=config.trust_remote_code),
            )
    adapt(model)
    outline: PreTrainedModel = model
    return outline


def place(source: str, config: ModelConfig, engine: EngineConfig) -> dict[str, torch.device]:
    """Return transformers' device_map: where each part of the model goes, on the last device what is last.

    Raises ConfigError if there are too few GPUs, or layers."""
    devices = pick_devices(engine.device, engine.devices_per_worker)
    if len(devices) == 1:
        return {"": devices[0]}
    return device_map(load_outline(source, config), devices, is_packed=config.quantization is not None)


def load_base(source: str, config: ModelConfig, engine: EngineConfig) -> Base:
    """Load the model, frozen, with every weight from the checkpoint, and check it in packed passes."""
    places = place(source, config, engine)
    device = list(places.values())[-1]
    if device.type == "cpu":
        keep_freed_memory()
        keep_to_own_cores()
    elif device.index is not None:
        torch.cuda.set_device(device)  # otherwise pinned memory and some kernels use cuda:0
    dtype = pick_dtype(engine.dtype, device)
    model, found = _from_pretrained(
        AutoModelForCausalLM,
        source,
        config,
        dtype=dtype,
        device_map=places,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, with the names
        **_quantization(config, dtype),
    )
    _check_whole(config, model, found)
    model.requires_grad_(False)
    model.eval()
    if len(places) > 1:
        bring_inputs(model)
    adapt(model)
    _keep_trainable(model)
    check_packing(model, config.path)
    return Base(model, source, device, dtype)


def untrained_ids(model: PreTrainedModel, ids: Sequence[int]) -> list[int]:
    """Return the ids whose embedding, or whose row of the output head, is zero: they were never trained."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    wanted = torch.tensor(list(ids), dtype=torch.long)
    largest = [
        layer.weight[wanted.to(layer.weight.device)].abs().amax(dim=1).cpu() for layer in layers if layer
    ]
    is_zero = torch.stack([row <= UNTRAINED for row in largest]).any(dim=0).tolist()
    return [id for id, zero in zip(ids, is_zero, strict=True) if zero]


def _quantization(config: ModelConfig, dtype: torch.dtype) -> dict[str, BitsAndBytesConfig]:
    """Return QLoRA's settings (arXiv 2305.14314): 4-bit NormalFloat with double quantization."""
    if config.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        rule, remedy = "needs the bitsandbytes package", "Run: pip install 'lora-search[qlora]'"
        raise ConfigError("model.quantization", config.quantization, rule, remedy)
    # It warns that a kernel is missing, which only inference would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": nf4}


def _keep_trainable(model: PreTrainedModel) -> None:
    """Keep 4-bit layers in a form that gradients can pass through.

    In evaluation mode, on a CPU with AVX512-BF16, bitsandbytes 0.50 permanently repacks a layer at its first
    call without gradients, for a kernel that has no backward pass. Training mode has no other effect on them.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state"):
            module.train()


def _check_whole(config: ModelConfig, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise ModelError if transformers has used random weights or added an adapter by itself."""
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"model.path: {config.path} is an adapter, not a base. Give the model it was trained on."
        )
    check_missing(config.path, found["missing_keys"])
    check_unexpected(config.path, found["unexpected_keys"])
    if found["mismatched_keys"]:
        name, stored, expected = sorted(found["mismatched_keys"])[0]
        raise ModelError(
            f"model.path: {config.path} does not fit its config.json: {name} is {list(stored)} in the file, "
            f"{list(expected)} in the configuration. Give weights and configuration of the same model."
        )


def _from_pretrained(loader: type, source: str, config: ModelConfig, **options: object) -> Any:
    """Load with transformers; its errors become one message."""
    options |= {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    place = location(source, config)
    return _explained(config, lambda: loader.from_pretrained(place, **options))  # type: ignore[attr-defined]


def _explained(config: ModelConfig, load: Callable[[], T]) -> T:
    try:
        return load()
    except LoraSearchError:
        raise
    except Exception as error:  # noqa: BLE001 (a model's code answers strange files with whatever it runs into)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".: ")
        raise ModelError(
            f"model.path: {config.path} cannot be loaded: {reason}. {_remedy(config, error)}"
        ) from None


def _remedy(config: ModelConfig, error: Exception) -> str:
    for part, remedy in REMEDIES.items():
        if part in str(error):
            return remedy
    if isinstance(error, UNREADABLE):
        return DAMAGED
    if isinstance(error, ImportError):
        return "Install what it names, or choose another base."
    if os.path.exists(Path(config.path).expanduser()):  # unlike Path.exists, False without permission to look
        return "Check the files in it, or give another base."
    return "Check name and network, log in with `hf auth login` for gated models, or give a folder."
