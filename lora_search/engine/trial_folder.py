"""What outlives a trial's process: checkpoint/ and adapter/ in its folder.

adapter/ holds the best rung by the study, even after a kill or damage: a checkpoint contains the best adapter
too, and an adapter records its rung. A checkpoint takes as much space as 4 adapters, or 3 if the last rung is
the best.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_search.engine.bank import SlotBank
from lora_search.engine.optim import SlotAdamW
from lora_search.engine.row import Parts
from lora_search.engine.slot import Slot
from lora_search.files.artifacts import Artifacts, remove_staged
from lora_search.files.atomic import remove_unfinished
from lora_search.files.checkpoint import Checkpoint, Position, load_checkpoint, save_checkpoint
from lora_search.files.peft import BaseRecord, export_peft, read_peft
from lora_search.files.row_scores import write_scores
from lora_search.files.tensors import DamagedFileError
from lora_search.model.targets import exact_targets
from lora_search.trial import RowScores, TrialRun

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]
START = Position(
    examples_seen=0, optimizer_steps=0, rung=0, train_tokens=0, best_rung=0, best_perplexity=math.inf
)


@dataclass(frozen=True)
class Keeper:
    """Writes and reads the folders of trials for one engine. ``base`` is the record of their base."""

    bank: SlotBank
    optimizer: SlotAdamW
    base: BaseRecord
    artifacts: Artifacts | None = None  # where copies of the folders go

    def keep_best(self, index: int, slot: Slot, scores: RowScores) -> None:
        """Write the slot's current adapter and its row scores. Raises WriteError."""
        slot.best = self.bank.exported(index)
        self._export(slot.run, slot.names, slot.position, slot.best)
        write_scores(Path(slot.run.folder), scores, slot.position.best_rung)

    def save(self, index: int, slot: Slot) -> None:
        """Write the slot's checkpoint. Raises WriteError."""
        state = {
            f"{kind}/{name}": tensor
            for kind, parts in self._kinds(index).items()
            for name, tensor in self.bank.rows[index].layout.tensors(parts).items()
        }
        if slot.position.best_rung not in (0, slot.position.rung):
            state |= {f"best/{name}": tensor for name, tensor in slot.best.items()}
        save_checkpoint(_checkpoints(slot.run), slot.position, state, self._origins(slot.run)[0])
        if self.artifacts is not None:
            self.artifacts.put(slot.run.number, Path(slot.run.folder), slot.position.rung)

    def finish(self, slot: Slot) -> None:
        """Return when the copies of a trial at its end are whole. Raises ArtifactError."""
        if self.artifacts is not None:
            self.artifacts.put(slot.run.number, Path(slot.run.folder), slot.position.rung)
            self.artifacts.settle(slot.run.number)

    def resume(
        self, index: int, run: TrialRun, names: Sequence[str]
    ) -> tuple[Position, dict[str, torch.Tensor], str]:
        """Load the last intact checkpoint into the slot; return position, best adapter, what was wrong.
        Raises ArtifactError."""
        if self.artifacts is not None:
            remove_staged(Path(run.folder))
            self.artifacts.fetch(run.number, Path(run.folder))
        layout, kinds = self.bank.rows[index].layout, self._kinds(index)
        expected = {kind: layout.views(parts) for kind, parts in kinds.items()}
        expected |= {"best": self.bank.exported(index)}
        found, troubles = load_checkpoint(
            _checkpoints(run), self._origins(run), lambda found: _check_shapes(found, expected)
        )
        position, state = found or (START, {})
        for kind, parts in kinds.items() if found else ():
            layout.load(parts, _part(state, kind))
        self.bank.refresh(index)
        self.optimizer.moments[index].steps = position.optimizer_steps
        now = self.bank.exported(index)
        best = now if position.best_rung == position.rung else _part(state, "best")
        position, best, lost = self._settle_adapter(run, names, position, best)
        recovery = _recovery_message(troubles, position.rung, lost)
        if recovery:
            logger.warning("trial %d: %s", run.number, recovery)
        return position, best, recovery

    def _settle_adapter(
        self, run: TrialRun, names: Sequence[str], position: Position, best: dict[str, torch.Tensor]
    ) -> tuple[Position, dict[str, torch.Tensor], str]:
        """Make adapter/ hold the best rung that study and checkpoint know of.

        If the study is ahead, the best adapter is on disk or is trained again.
        """
        known = {rung: perplexity for rung, (_, perplexity) in enumerate(position.curve, start=1)}
        known |= run.perplexities
        remove_unfinished(_adapter(run))
        best_rung = run.kept_rung(known)
        if best_rung != position.best_rung:
            kept = self._kept_adapter(run, best_rung)
            if kept is not None:
                return replace(position, best_rung=best_rung, best_perplexity=known[best_rung]), kept, ""
        if position.best_rung:
            self._export(run, names, position, best)
        else:
            shutil.rmtree(_adapter(run), ignore_errors=True)
        return position, best, "" if best_rung == position.best_rung else f"the adapter of rung {best_rung}"

    def _kept_adapter(self, run: TrialRun, rung: int) -> dict[str, torch.Tensor] | None:
        try:
            weights, note = read_peft(_adapter(run))
        except DamagedFileError:
            return None
        is_it = note.get("rung") == rung and note.get("origin") in self._origins(run)
        return weights if is_it else None

    def _export(self, run: TrialRun, names: Sequence[str], position: Position, best: Tensors) -> None:
        note = {
            "origin": self._origins(run)[0],
            "digest": self.base.digest,
            "study_id": run.study_id,
            "rung": position.best_rung,
            "perplexity": position.best_perplexity,
        }
        targets = exact_targets(names, self.base.module_names)
        export_peft(best, run.settings, targets, self.base, _adapter(run), note)

    def _kinds(self, index: int) -> dict[str, Parts]:
        row, moments = self.bank.rows[index], self.optimizer.moments[index]
        kinds = {"theta": row.theta, "m": moments.exp_avg, "v": moments.exp_avg_sq}
        return kinds | {"start": row.start} if row.start else kinds

    def _origins(self, run: TrialRun) -> tuple[str, str]:
        """Return digests of the study and of what decides a trial's numbers: a folder may hold files of a
        deleted study. New files get the first digest; those of older versions have the second."""
        here = [run.settings.record(), run.seed, run.study_id, self.base.digest]
        return _digest(here), self._origin_before_studies_had_ids(run)

    def _origin_before_studies_had_ids(self, run: TrialRun) -> str:
        """LEGACY: the origin in versions without a study id; read, never written. `prepare.check_older` has
        compared what it does not cover."""
        model = (Path(self.base.path).name, str(self.bank.dtype))
        return _digest([run.settings.record(), run.seed, self.base.data_hash, *model])


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _checkpoints(run: TrialRun) -> Path:
    return Path(run.folder) / "checkpoint"


def _adapter(run: TrialRun) -> Path:
    return Path(run.folder) / "adapter"


def _part(state: Tensors, kind: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{kind}/"): t for name, t in state.items() if name.startswith(f"{kind}/")}


def _check_shapes(found: Checkpoint, expected: Mapping[str, Tensors]) -> None:
    position, state = found
    kinds = dict(expected)
    if position.best_rung in (0, position.rung):
        del kinds["best"]
    shapes = {f"{kind}/{name}": tensor.shape for kind, part in kinds.items() for name, tensor in part.items()}
    if {name: tensor.shape for name, tensor in state.items()} != shapes:
        raise DamagedFileError("has other layers or shapes than the trial")


def _recovery_message(troubles: Sequence[str], rung: int, lost: str) -> str:
    """Return what was wrong and what was done about it; empty if nothing was wrong."""
    resumed = f"resumed from rung {rung}" if rung else "restarted from the beginning"
    parts = ["; ".join(troubles)] if troubles else []
    parts += [f"{lost} is lost until that rung is trained again"] if lost else []
    return f"{'; '.join(parts)}: {resumed}" if parts else ""
