"""Trains many trials at once over one frozen base and yields what they measure. Knows no Optuna, no W&B.

`advance` runs one packed pass; a slot steps when its own effective batch is complete and is evaluated when it
reaches a rung. A trial's numbers do not depend on its slot, its neighbours, or how batches are cut into
passes.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lora_search.axis import DataAxis
from lora_search.checkpoint import Position, load_checkpoint, save_checkpoint
from lora_search.config import ALL_LINEAR, SweepConfig
from lora_search.data import Splits
from lora_search.errors import LoraSearchError
from lora_search.evaluation import perplexities
from lora_search.fitting import Fit, bytes_per_slot, fit
from lora_search.lora import SlotBank, export_peft
from lora_search.memory import available_bytes, give_back_memory, is_out_of_memory
from lora_search.model import Base, matches, target_layers
from lora_search.optim import SlotAdamW, learning_rate
from lora_search.packing import fill_pass
from lora_search.passes import PackedModel, SlotRows
from lora_search.recompute import recompute_layers
from lora_search.slots import Slot
from lora_search.space import Space, largest, possible_targets, smallest, trial_settings
from lora_search.trial import EndReason, Measurement, SlotView, StepRecord, TrialRun, TrialSettings

logger = logging.getLogger(__name__)

Packed = Sequence[tuple[int, Slot, SlotRows]]
START = Position(
    examples_seen=0, optimizer_steps=0, rung=0, train_tokens=0, best_rung=0, best_perplexity=math.inf
)


class Engine:
    """S slots over one base. ``resolve_targets`` maps a trial's target modules to full layer names."""

    def __init__(
        self,
        model: PackedModel,
        bank: SlotBank,
        splits: Splits,
        *,
        data_seed: int,
        tokens_per_pass: int,
        base_path: str,
        resolve_targets: Callable[[tuple[str, ...]], tuple[str, ...]],
    ) -> None:
        self.model, self.bank, self.splits = model, bank, splits
        self.axis = DataAxis(splits.train, data_seed)
        self.optimizer = SlotAdamW(bank.theta_SP, bank.grad_SP)
        self.tokens_per_pass, self.base_path = tokens_per_pass, base_path
        self.resolve_targets = resolve_targets
        self.slots: list[Slot | None] = [None] * bank.theta_SP.shape[0]
        self.tokens_per_second = 0.0

    @property
    def free_slots(self) -> int:
        return self.slots.count(None)

    def admit(self, runs: Sequence[TrialRun]) -> None:
        """Give each trial a slot; one that left a checkpoint goes on from there."""
        for run in runs:
            index = self.slots.index(None)
            names = self.resolve_targets(run.settings.target_modules)
            self.bank.admit(index, run.settings, names, run.seed)
            self.optimizer.reset(index)
            position = self._resume(index, run, names)
            slot = Slot(run, names, position, self.axis.total_steps(run.settings))
            slot.train_tokens = position.train_tokens
            self._next_batch(slot)
            self.slots[index] = slot

    def release(self, trial_numbers: Sequence[int]) -> None:
        """Empty the slots of these trials."""
        for index, slot in enumerate(self.slots):
            if slot is not None and slot.run.number in trial_numbers:
                self.bank.release(index)
                self.slots[index] = None

    def advance(self) -> list[Measurement]:
        """Run one packed pass; return the measurements of the trials that reached a rung in it.

        Report them before the next call, which writes the checkpoints: these never know more than the study.
        """
        self._save_measured()
        active = [(index, slot) for index, slot in enumerate(self.slots) if slot is not None]
        queues = [[len(row.input_ids) for row, _ in slot.batch.rows] for _, slot in active]
        taken = fill_pass(queues, self.tokens_per_pass)
        chosen = [(i, slot, count) for (i, slot), count in zip(active, taken, strict=True) if count]
        packed = [(i, slot, slot.take(i, count)) for i, slot, count in chosen]
        if not self._forward_backward(packed):
            return []
        due = [(index, slot) for index, slot, _ in packed if not slot.batch.rows and self._step(index, slot)]
        measurements = self._measure(due)
        self.release([m.trial_number for m in measurements if m.ended])
        return measurements

    def evaluate_base(self) -> float:
        """Return the validation perplexity of the bare base."""
        return self._perplexities([None])[0]

    def views(self) -> list[SlotView]:
        """Return what each busy slot is doing."""
        busy = [slot for slot in self.slots if slot is not None]
        return [slot.view(self.axis.rung_examples(slot.settings, slot.position.rung + 1)) for slot in busy]

    def _forward_backward(self, packed: Packed) -> bool:
        """Add the pass's gradients to the bank; return False where memory ran out: to be repeated."""
        start = time.perf_counter()
        try:
            nlls = self.model.nll([rows for _, _, rows in packed])
            pairs = zip(nlls, packed, strict=True)
            losses = [nll.sum() / slot.batch.num_completion_tokens for nll, (_, slot, _) in pairs]
            torch.stack(losses).sum().backward()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            losses = []
        if not losses:
            self._repeat(packed)
            return False
        seconds, tokens = time.perf_counter() - start, sum(rows.num_tokens for _, _, rows in packed)
        self.tokens_per_second = tokens / seconds
        for loss, (_, slot, rows) in zip(losses, packed, strict=True):
            slot.batch.losses.append(loss.detach())
            slot.batch.num_tokens += rows.num_tokens
            slot.batch.seconds += seconds * rows.num_tokens / tokens
        return True

    def _repeat(self, packed: Packed) -> None:
        """Take back what a pass that ran out of memory may have left, and queue its batches anew, for smaller
        passes: the same rows, masks and sums."""
        for index, slot, _ in packed:
            self.bank.grad_SP[index].zero_()
            self._next_batch(slot)
        self._halve_passes(sum(len(rows.rows) for _, _, rows in packed))

    def _halve_passes(self, num_rows: int) -> None:
        if num_rows <= 1:
            longest = max(len(row.input_ids) for row in (*self.splits.train, *self.splits.validation))
            raise LoraSearchError(
                f"engine.tokens_per_pass: out of memory with a single row (longest: {longest} tokens). "
                "Lower data.max_length, lora.r or engine.slots, or use a device with more memory."
            )
        give_back_memory(self.model.device)
        self.tokens_per_pass = max(1, self.tokens_per_pass // 2)
        logger.warning(
            "out of memory: passes of %d tokens from now on; the numbers stay the same", self.tokens_per_pass
        )

    def _step(self, index: int, slot: Slot) -> bool:
        """Take the optimizer step of a complete effective batch; return whether a rung is reached."""
        lr = learning_rate(slot.settings, slot.position.optimizer_steps, slot.total_steps)
        slot.end_step(lr, self.optimizer.step(index, slot.settings, lr))
        self.bank.refresh(index)
        if self._has_reached(slot, slot.position.rung + 1):
            return True
        self._next_batch(slot)
        return False

    def _has_reached(self, slot: Slot, rung: int) -> bool:
        return slot.position.examples_seen >= self.axis.rung_examples(slot.settings, rung)

    def _next_batch(self, slot: Slot) -> None:
        slot.begin_batch(self.axis.batch(slot.position.examples_seen, slot.settings))

    def _measure(self, due: Sequence[tuple[int, Slot]]) -> list[Measurement]:
        values = self._perplexities([index for index, _ in due])
        return [
            m
            for (index, slot), value in zip(due, values, strict=True)
            for m in self._rungs(index, slot, value)
        ]

    def _perplexities(self, slots: Sequence[int | None]) -> list[float]:
        rows = self.splits.validation
        while True:
            try:
                return perplexities(self.model, slots, rows, self.tokens_per_pass)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            longest = max(len(row.input_ids) for row in rows)
            self._halve_passes(len(rows) if self.tokens_per_pass > longest else 1)

    def _rungs(self, index: int, slot: Slot, perplexity: float) -> list[Measurement]:
        """Record every rung that the trial's last step passed: more than one where a step spans several."""
        steps = slot.step_records()
        finite = math.isfinite(perplexity) and all(math.isfinite(s.loss + s.grad_norm) for s in steps)
        perplexity = perplexity if finite else math.nan
        slot.last_loss, slot.last_perplexity = sum(s.loss for s in steps) / len(steps), perplexity
        measurements: list[Measurement] = []
        while self._has_reached(slot, slot.position.rung + 1):
            self._record_rung(index, slot, perplexity)
            ended, detail = slot.ending(finite)
            new_steps = () if measurements else steps
            measurements.append(self._measurement(slot, perplexity, new_steps, ended, detail))
            if ended:
                return measurements
        slot.is_saved = False
        slot.steps.clear()
        slot.train_seconds = 0.0
        self._next_batch(slot)
        return measurements

    def _record_rung(self, index: int, slot: Slot, perplexity: float) -> None:
        rung = slot.position.rung + 1
        slot.position = replace(slot.position, rung=rung, train_tokens=slot.train_tokens)
        if perplexity < slot.position.best_perplexity:  # never true for NaN
            slot.position = replace(slot.position, best_rung=rung, best_perplexity=perplexity)
            state = self.bank.tensors(self.bank.theta_SP[index], slot.settings.r, slot.names)
            export_peft(state, slot.settings, slot.names, self.base_path, Path(slot.run.folder) / "adapter")

    def _measurement(
        self,
        slot: Slot,
        perplexity: float,
        steps: tuple[StepRecord, ...],
        ended: EndReason | None,
        detail: str,
    ) -> Measurement:
        return Measurement(
            trial_number=slot.run.number,
            rung=slot.position.rung,
            examples_seen=slot.position.examples_seen,
            train_tokens=slot.train_tokens,
            train_seconds=slot.train_seconds if steps else 0.0,
            tokens_per_second=self.tokens_per_second,
            validation_loss=math.log(perplexity),
            perplexity=perplexity,
            best_rung=slot.position.best_rung,
            best_perplexity=slot.position.best_perplexity,
            steps=steps,
            ended=ended,
            detail=detail,
        )

    def _banks(self) -> dict[str, torch.Tensor]:
        return {
            "theta": self.bank.theta_SP,
            "m": self.optimizer.exp_avg_SP,
            "v": self.optimizer.exp_avg_sq_SP,
        }

    def _save_measured(self) -> None:
        for index, slot in enumerate(self.slots):
            if slot is not None and not slot.is_saved:
                self._save(index, slot)
                slot.is_saved = True

    def _save(self, index: int, slot: Slot) -> None:
        state = {
            f"{kind}/{name}": tensor
            for kind, bank_SP in self._banks().items()
            for name, tensor in self.bank.tensors(bank_SP[index], slot.settings.r, slot.names).items()
        }
        save_checkpoint(Path(slot.run.folder) / "checkpoint", slot.position, state)

    def _resume(self, index: int, run: TrialRun, names: tuple[str, ...]) -> Position:
        found = load_checkpoint(Path(run.folder) / "checkpoint")
        if found is None:
            return START
        position, state = found
        for kind, bank_SP in self._banks().items():
            part = {k.partition("/")[2]: tensor for k, tensor in state.items() if k.startswith(f"{kind}/")}
            self.bank.load(bank_SP[index], run.settings.r, names, part)
        self.bank.refresh(index)
        self.optimizer.steps[index] = position.optimizer_steps
        return position


@dataclass(frozen=True)
class Room:
    """What an engine must hold: all targets that a trial may have, largest rank, smallest batch, trials."""

    targets: tuple[tuple[str, ...], ...]
    max_rank: int
    min_batch_size: int
    num_trials: int

    @classmethod
    def of(cls, trials: Sequence[TrialSettings]) -> "Room":
        """Return room for just these trials."""
        targets = tuple(dict.fromkeys(trial.target_modules for trial in trials))
        max_rank, min_batch = max(t.r for t in trials), min(t.batch_size for t in trials)
        return cls(targets, max_rank, min_batch, len(trials))

    @classmethod
    def of_space(cls, config: SweepConfig, space: Space) -> "Room":
        """Return room for every trial of a space."""
        targets = tuple(possible_targets(config, space))
        max_rank = largest(config, space, "lora.r")
        return cls(targets, max_rank, smallest(config, space, "train.batch_size"), config.study.n_trials)


def build_engine(config: SweepConfig, room: Room, base: Base, splits: Splits) -> tuple[Engine, str]:
    """Return an engine of that room, and how its size was chosen ("": it was set).

    Raises ModelError where a target does not exist.
    """
    layers: dict[str, nn.Linear] = {}
    for targets in room.targets:
        layers |= target_layers(base.model, targets)
    everything = target_layers(base.model, (ALL_LINEAR,))
    layers = {name: layer for name, layer in everything.items() if name in layers}
    if config.engine.gradient_checkpointing is True:
        recompute_layers(base.model)
    chosen = _fit(config, room, base, splits, layers)
    bank = SlotBank(base.model, layers, chosen.slots, room.max_rank, base.dtype)
    engine = Engine(
        PackedModel(base.model, bank),
        bank,
        splits,
        data_seed=config.seed,
        tokens_per_pass=chosen.tokens_per_pass,
        base_path=base.source,
        resolve_targets=lambda targets: tuple(name for name in layers if matches(name, targets)),
    )
    return engine, chosen.note


def _fit(config: SweepConfig, room: Room, base: Base, splits: Splits, layers: Mapping[str, nn.Linear]) -> Fit:
    """Choose what is auto by a probe with one slot, which leaves the model as it was."""
    slots, tokens = config.engine.slots, config.engine.tokens_per_pass
    if isinstance(slots, int) and isinstance(tokens, int):
        return Fit(slots, tokens)
    bank = SlotBank(base.model, layers, 1, room.max_rank, base.dtype)
    bank.admit(0, replace(trial_settings(config, {}), r=bank.max_rank), bank.names, seed=0)
    model, per_slot = PackedModel(base.model, bank), bytes_per_slot(bank)
    sharing = (config.launcher.workers or 1) if base.device.type == "cpu" else 1  # one GPU each, one memory
    free, batch = available_bytes(base.device) // sharing, room.min_batch_size
    chosen = fit(config.engine, model, splits.train, batch, per_slot, room.num_trials, free)
    bank.remove(base.model)
    return chosen
