"""A trial's state at a rung: adapter, moments, position, curve. One sealed file per rung; the last two are
kept.

A file that is damaged, or belongs to another trial, is renamed and reported, and never used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lora_search.files.atomic import explained_writing, remove_unfinished
from lora_search.files.tensors import DamagedFileError, read_sealed, write_sealed

KEPT = 2  # the last one, and one more in case the last is damaged
PUT_ASIDE = ".damaged"


@dataclass(frozen=True, kw_only=True)
class Position:
    """The progress of a trial. Best values are over its rungs so far; ``best_rung`` 0 means none yet.

    ``curve[k - 1]`` is (examples seen, validation perplexity) at rung k.
    """

    examples_seen: int
    optimizer_steps: int
    rung: int
    train_tokens: int
    best_rung: int
    best_perplexity: float
    curve: tuple[tuple[int, float], ...] = ()


Checkpoint = tuple[Position, dict[str, torch.Tensor]]


def save_checkpoint(
    folder: Path, position: Position, state: Mapping[str, torch.Tensor], origin: str = ""
) -> None:
    """Write the state of a rung atomically, then delete checkpoints beyond the last two. Raises WriteError.

    ``origin`` identifies the trial; a checkpoint is loaded only with the same origin.
    """
    note = {"origin": origin, "position": asdict(position)}
    write_sealed(folder / f"rung-{position.rung:05d}.safetensors", state, note)
    for path in _newest_first(folder)[KEPT:]:
        path.unlink(missing_ok=True)


def load_checkpoint(
    folder: Path, origins: Sequence[str] = ("",), check: Callable[[Checkpoint], None] = lambda _: None
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest intact checkpoint of one of the origins, and the problems of newer ones.

    ``check`` raises DamagedFileError for a checkpoint that does not fit. Removes unfinished files of killed
    processes.
    """
    remove_unfinished(folder)
    troubles: list[str] = []
    for path in _newest_first(folder):
        try:
            found = _read(path, origins)
            check(found)
        except DamagedFileError as error:
            troubles.append(f"{path.name} {error}")
            with explained_writing(path):
                path.replace(path.with_name(path.name + PUT_ASIDE))
        else:
            return found, troubles
    return None, troubles


def _read(path: Path, origins: Sequence[str]) -> Checkpoint:
    state, note = read_sealed(path)
    if note.get("origin") not in origins:
        raise DamagedFileError("belongs to another study, or to a trial with other settings, data or base")
    try:
        fields = note["position"]
        curve = tuple((int(seen), float(perplexity)) for seen, perplexity in fields["curve"])
        return Position(**{**fields, "curve": curve}), state
    except (KeyError, TypeError, ValueError):
        raise DamagedFileError("has no position that this version can read") from None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("rung-*.safetensors"), reverse=True)
