"""A trial's state at its last rung: adapter, moments, position. One small file, written atomically, no
pickle."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

FILE_NAME = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a trial had come. Best values are over its rungs so far; ``best_rung`` 0 means none yet."""

    examples_seen: int
    optimizer_steps: int
    rung: int
    train_tokens: int
    best_rung: int
    best_perplexity: float


def save_checkpoint(folder: Path, position: Position, state: Mapping[str, torch.Tensor]) -> None:
    """Write state and position so that a reader finds either the old file or the new one, never a part."""
    folder.mkdir(parents=True, exist_ok=True)
    content = save(dict(state), metadata={"position": json.dumps(asdict(position))})
    temporary = folder / f"{FILE_NAME}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILE_NAME)


def load_checkpoint(folder: Path) -> tuple[Position, dict[str, torch.Tensor]] | None:
    """Return the last whole checkpoint, or None where there is none that can be read."""
    path = folder / FILE_NAME
    try:
        with safe_open(path, framework="pt") as file:
            position = Position(**json.loads(file.metadata()["position"]))
            return position, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        return None
