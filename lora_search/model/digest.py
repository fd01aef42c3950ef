"""Digests of a base: weights, configuration, code, tokenizer, layers, and the hub's commit.

Reads the weights once per machine, about 1.1 s per GiB on one core (`model.cache` keeps the digest).
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_search.errors import ModelError
from lora_search.model.cache import file_digest
from lora_search.model.sources import folder_of, is_hub_id
from lora_search.model.targets import target_layers
from lora_search.settings.schema import ALL_LINEAR, ModelConfig

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in transformers' order of search
UNIMPORTANT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # engine.dtype decides
HASHING_THREADS = 4  # hashing releases the interpreter's lock; a disk rarely feeds more


def base_content(source: str, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the digests of a resolved model, without its weights if they are not downloaded yet.
    ``config.revision`` is the commit of a hub id."""
    content = {"content.tokenizer": _tokenizer(tokenizer)}
    if is_hub_id(source) and config.revision:
        content["content.commit"] = config.revision
    folder = folder_of(source, config)
    if folder is None:
        return content
    if (folder / "config.json").is_file():
        content["content.config"] = _configuration(folder / "config.json")
    weights = weight_files(folder)
    if weights and all(path.is_file() for path in weights):
        content["content.weights"] = _files(config, weights)
    if config.trust_remote_code:
        content["content.code"] = _files(config, sorted(folder.glob("*.py")))
    return content


def layers_content(model: PreTrainedModel) -> dict[str, str]:
    """Return a digest of the layers that can carry adapters, and the precision of float32 matmuls."""
    layers = target_layers(model, (ALL_LINEAR,))
    shapes = [f"{name} {layer.out_features} x {layer.in_features}" for name, layer in layers.items()]
    return {
        "content.layers": text_digest("\n".join(shapes)),
        "content.float32_matmul": torch.get_float32_matmul_precision(),
    }


def weight_files(folder: Path) -> list[Path]:
    """Return the files from which transformers reads the weights: one, or the parts of an index."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged: loading reports it
                return [
                    folder / part
                    for part in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
                ]
    return []


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _files(config: ModelConfig, paths: list[Path]) -> str:
    """Return one digest of the files and their names."""
    try:
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            digests = list(pool.map(file_digest, paths))
    except OSError as error:
        raise ModelError(
            f"model.path: {config.path}: {error.filename} cannot be read: {error.strerror}. Fetch it again."
        ) from None
    return text_digest("\n".join(f"{d} {path.name}" for d, path in zip(digests, paths, strict=True)))


def _configuration(path: Path) -> str:
    values = json.loads(path.read_bytes())
    kept = {key: value for key, value in values.items() if key not in UNIMPORTANT}
    return text_digest(json.dumps(kept, sort_keys=True))


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of how text becomes tokens, from the loaded tokenizer, since its files come in many
    layouts. Padding and truncation are left out: the tokenizer does neither here."""
    special = json.dumps(
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python
        return text_digest(f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())} {special}")
    rules = json.loads(backend.to_str())
    rules |= {"padding": None, "truncation": None}
    return text_digest(json.dumps(rules, sort_keys=True) + special)
