"""Adapters in PEFT's format: written in one go, sealed, read back."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig

from lora_search.files.atomic import TEMPORARY, explained_writing, write_file
from lora_search.files.tensors import read_sealed, write_sealed
from lora_search.trial import TrialSettings

PEFT_PREFIX, WEIGHTS_NAME = "base_model.model.", "adapter_model.safetensors"


def lora_scaling(settings: TrialSettings) -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732), as PEFT does."""
    return settings.alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)


def export_peft(
    state: Mapping[str, torch.Tensor],
    settings: TrialSettings,
    names: Sequence[str],
    base_path: str,
    folder: Path,
    note: Mapping[str, object] | None = None,
) -> None:
    """Write a folder that plain ``PeftModel.from_pretrained`` loads; the weights change in one go, sealed
    with the note."""
    config = PeftLoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # PEFT divides it, so a fraction is fine
        lora_dropout=settings.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
        use_rslora=settings.use_rslora,
        base_model_name_or_path=base_path,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    _write_config(config, folder)
    weights = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state.items()}
    write_sealed(folder / WEIGHTS_NAME, weights, note or {})


def read_peft(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return weights and note as `export_peft` was given them. Raises DamagedFileError."""
    weights, note = read_sealed(folder / WEIGHTS_NAME)
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in weights.items()}, note


def _write_config(config: PeftLoraConfig, folder: Path) -> None:
    """Let PEFT write beside the folder, so that a full disk leaves the old file as it was."""
    fresh = folder.with_name(f"{folder.name}{TEMPORARY}")
    with explained_writing(folder):
        config.save_pretrained(str(fresh))
        for path in fresh.iterdir():
            old, content = folder / path.name, path.read_bytes()
            if not old.exists() or old.read_bytes() != content:  # of a trial's rungs only the first differs
                write_file(old, content)
        shutil.rmtree(fresh)
