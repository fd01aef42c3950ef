"""Trains many trials at once over one frozen base and yields their measurements. No Optuna, no W&B.

`advance` runs one packed pass; a slot steps when its own effective batch is complete and is evaluated when it
reaches a rung. A trial's numbers do not depend on its slot, its neighbours, or how batches are cut into
passes. An error in one trial ends only that trial (docs/failures.md).
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from lora_search.data.order import DataAxis
from lora_search.data.rows import Example, Splits
from lora_search.data.store import lengths_of
from lora_search.engine.bank import SlotBank
from lora_search.engine.evaluation import score_rows, shareable_tokens
from lora_search.engine.optim import SlotAdamW, learning_rate
from lora_search.engine.packed_model import PackedModel, SlotRows
from lora_search.engine.packing import fill_pass
from lora_search.engine.slot import Queue, Slot
from lora_search.engine.trial_folder import START, Keeper
from lora_search.errors import DoesNotFitError, LoraSearchError
from lora_search.failures import failure_reason, first_line
from lora_search.files.artifacts import Artifacts
from lora_search.files.peft import BaseRecord, read_peft
from lora_search.ops.device import Lap, Throughput, give_back_memory, is_out_of_memory
from lora_search.trial import Measurement, RowScores, SlotView, TrialRun, TrialSettings

logger = logging.getLogger(__name__)

Packed = Sequence[tuple[int, Slot, SlotRows]]
T = TypeVar("T")


class Engine:
    """S slots over one base. ``resolve_targets`` maps a trial's target modules to full layer names;
    ``bank_bytes`` is what the trials in slots may take together (`Queue`)."""

    def __init__(
        self,
        model: PackedModel,
        bank: SlotBank,
        splits: Splits,
        *,
        data_seed: int,
        tokens_per_pass: int,
        base: BaseRecord,
        resolve_targets: Callable[[tuple[str, ...]], tuple[str, ...]],
        bank_bytes: int | None = None,
    ) -> None:
        self.model, self.bank, self.splits = model, bank, splits
        self.num_shared = shareable_tokens(model, splits.validation)
        self.axis = DataAxis(splits.train, data_seed)
        self.optimizer = SlotAdamW(bank.rows)
        self.keeper = Keeper(bank, self.optimizer, base)
        self.tokens_per_pass = tokens_per_pass
        self.resolve_targets = resolve_targets
        self.slots: list[Slot | None] = [None] * bank.num_slots
        self.queue = Queue(bank_bytes)
        self.throughput = Throughput()
        self.after_pass: Callable[[], None] = lambda: None  # called after every pass; may release trials
        self._suspects: list[Slot] = []  # trials of a pass that raised: each trains alone until its next step
        self._outcomes: list[Measurement] = []  # of failed trials, or from checkpoints ahead of the study

    def keep_copies(self, artifacts: Artifacts) -> None:
        """From now on copy the folders of trials there, and resume trials from there."""
        self.keeper = replace(self.keeper, artifacts=artifacts)

    def drop_checkpoint_copy(self, trial_number: int) -> None:
        """Let the copy of a trial that the study has ended go without its checkpoint."""
        if self.keeper.artifacts is not None:
            self.keeper.artifacts.put_end(trial_number)

    def close(self) -> None:
        """Return when every copy that was started is complete or has failed."""
        if self.keeper.artifacts is not None:
            self.keeper.artifacts.close()

    @property
    def free_slots(self) -> int:
        """How many trials to bring; 0 while one waits for memory."""
        return 0 if self.queue.waiting else self.slots.count(None)

    @property
    def busy(self) -> list[Slot]:
        return [slot for slot in self.slots if slot is not None]

    @property
    def tokens_per_second(self) -> float:
        """Return the training throughput of the last passes, over all slots."""
        return self.throughput.tokens_per_second

    def admit(self, runs: Sequence[TrialRun]) -> None:
        """Give each trial a slot as soon as there is memory for it; one with a checkpoint resumes from it.

        `advance` returns the measurements that the study lacks, and the trials that could not start.
        """
        for run in runs:
            slot = Slot(run, (), START, self.axis.total_steps(run.settings))
            self._for_one(slot, partial(self._enqueue, slot))
        self._seat()

    def _enqueue(self, slot: Slot) -> None:
        slot.names = self.resolve_targets(slot.settings.target_modules)
        slot.num_bytes = self.bank.bytes_of(slot.settings, slot.names)
        self.queue.waiting.append(slot)

    def _seat(self) -> None:
        """Give free slots to the trials that wait, as far as there is memory."""
        while None in self.slots and (slot := self.queue.next(self.busy)) is not None:
            index = self.slots.index(None)
            self.slots[index] = slot
            self._for_one(slot, partial(self._begin_or_wait, index, slot))

    def _begin_or_wait(self, index: int, slot: Slot) -> None:
        try:
            self._begin(index, slot)
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.busy == [slot]:
                raise
            logger.warning("trial %d waits: no memory beside the others", slot.run.number)
            self.release([slot.run.number])
            self.queue.push_back(slot, self.busy)

    def _begin(self, index: int, slot: Slot) -> None:
        self.bank.admit(index, slot.settings, slot.names, slot.run.seed)
        self.optimizer.reset(index)
        slot.position, slot.best, slot.recovery = self.keeper.resume(index, slot.run, slot.names)
        slot.train_tokens = slot.position.train_tokens
        self._outcomes += slot.missing_measurements()
        self._next_batch(slot)

    def release(self, trial_numbers: Sequence[int]) -> None:
        """Empty the slots of these trials; those that wait go, too."""
        self.queue.drop(trial_numbers)
        for index, slot in enumerate(self.slots):
            if slot is not None and slot.run.number in trial_numbers:
                self.bank.release(index)
                self.optimizer.release(index)
                self.slots[index] = None

    def advance(self) -> list[Measurement]:
        """Run one packed pass; return the rungs reached in it, and the trials that ended."""
        self._seat()
        packed = self._take_pass()
        if packed and self._forward_backward(packed):
            self.after_pass()
            whole = [(i, slot) for i, slot, _ in packed if self.slots[i] is slot and not slot.batch.rows]
            due = [(i, slot) for i, slot in whole if self._for_one(slot, partial(self._step, i, slot))]
            self._outcomes += self._measure(due)
        outcomes, self._outcomes = self._outcomes, []
        self.release([m.trial_number for m in outcomes if m.ended])
        return outcomes

    def _take_pass(self) -> Packed:
        """Take the rows of the next pass: of all trials, or of one that may have made the last pass fail."""
        self._suspects = [slot for slot in self._suspects if slot in self.slots]
        chosen = self._suspects[:1] or self.busy
        active = [(self.slots.index(slot), slot) for slot in chosen]
        queues = [[len(row.input_ids) for row, _ in slot.batch.rows] for _, slot in active]
        taken = fill_pass(queues, self.tokens_per_pass)
        return [(i, slot, slot.take(i, n)) for (i, slot), n in zip(active, taken, strict=True) if n]

    def evaluate_base(self) -> RowScores:
        """Return the bare base's scores of the validation rows."""
        return self.scores([None], self.splits.validation)[0]

    def views(self) -> list[SlotView]:
        """Return what each busy slot is doing."""
        examples = self.axis.rung_examples
        return [slot.view(examples(slot.settings, slot.position.rung + 1)) for slot in self.busy]

    def _forward_backward(self, packed: Packed) -> bool:
        """Add the pass's gradients to the bank; return False if memory ran out: repeat the pass."""
        lap, losses = Lap(self.model.devices), []
        try:
            losses = self._losses(packed)
        except Exception as error:  # noqa: BLE001  (whose fault it was shows when each runs alone)
            trouble = self._explain(error)
        if not losses:
            self._repeat(packed, trouble)
            return False
        lap.stop()
        tokens = sum(rows.num_tokens for _, _, rows in packed)
        self.throughput.note(lap, tokens)
        for loss, (_, slot, rows) in zip(losses, packed, strict=True):
            slot.batch.losses.append(loss)
            slot.batch.num_tokens += rows.num_tokens
            slot.batch.laps.append((lap, rows.num_tokens / tokens))
        return True

    def _losses(self, packed: Packed) -> list[torch.Tensor]:
        """Return each slot's part of its batch's loss. A separate function, so that
        nothing references the graph when memory runs out and the pass is repeated."""
        nlls = self.model.nll([rows for _, _, rows in packed])
        pairs = zip(nlls, packed, strict=True)
        losses = [self.model.weighted_sum(nll, rows) / slot.batch.weight for nll, (_, slot, rows) in pairs]
        with torch.autograd.set_multithreading_enabled(not self.model.is_row_by_row):
            torch.stack(losses).sum().backward()  # a row's plan is set for all devices on the way back
        return [loss.detach() for loss in losses]

    def _repeat(self, packed: Packed, trouble: str | None) -> None:
        """Discard the gradients of a failed pass and queue its batches again: the same rows, masks and sums,
        in smaller passes if memory ran out (None), else slot by slot."""
        for index, slot, _ in packed:
            for grad_P in self.bank.rows[index].grad:
                grad_P.zero_()
            self._next_batch(slot)
        slots = [slot for _, slot, _ in packed]
        if trouble is None:
            self._for_one(slots[0], partial(self._halve_passes, sum(len(rows.rows) for _, _, rows in packed)))
        elif len(slots) == 1:
            self._fail(slots[0], trouble)
        else:
            self._suspects = slots
            logger.warning("a pass failed: %s; its trials are run again one by one", trouble)

    def _explain(self, error: Exception) -> str | None:
        """Return why a trial failed, None if memory ran out; raise errors that end the whole sweep."""
        if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
            remedy = "The trials return to the study; run the same command again."
            message = f"engine.device: the device failed: {first_line(error)}. {remedy}"
            raise LoraSearchError(message) from None
        if isinstance(error, DoesNotFitError):
            return str(error)
        if isinstance(error, LoraSearchError):
            raise error
        return None if is_out_of_memory(error) else failure_reason(error)

    def _for_one(self, slot: Slot, act: Callable[[], T]) -> T | None:
        """Run ``act`` for one trial; an exception ends only that trial."""
        try:
            return act()
        except Exception as error:  # noqa: BLE001  (a bug in one trial must not end the others)
            self._fail(slot, self._explain(error) or failure_reason(error))
            return None

    def _fail(self, slot: Slot, reason: str) -> None:
        self._outcomes.append(slot.measurement(math.nan, ended="failed", detail=reason))
        self.release([slot.run.number])

    def _halve_passes(self, num_rows: int) -> None:
        if num_rows <= 1:
            longest = max(int(lengths_of(part).max()) for part in (self.splits.train, self.splits.validation))
            raise DoesNotFitError(
                f"engine.tokens_per_pass: out of memory with a single row (longest: {longest} tokens). "
                "Lower data.max_length, lora.r or engine.slots, or use a device with more memory."
            )
        give_back_memory(self.model.device)
        self.tokens_per_pass = max(1, self.tokens_per_pass // 2)
        logger.warning(
            "out of memory: passes of %d tokens from now on; the numbers stay the same", self.tokens_per_pass
        )

    def _step(self, index: int, slot: Slot) -> bool:
        """Take the optimizer step of a complete effective batch; return whether it reached a rung."""
        lr = learning_rate(slot.settings, slot.position.optimizer_steps, slot.total_steps)
        slot.end_step(lr, self.optimizer.step(index, slot.settings, lr))
        self.bank.refresh(index)
        self._suspects = [suspect for suspect in self._suspects if suspect is not slot]
        if slot.watch.has_diverged:
            self._outcomes.append(slot.diverge())
            return False
        if self._has_reached(slot, slot.position.rung + 1):
            return True
        self._next_batch(slot)
        return False

    def _has_reached(self, slot: Slot, rung: int) -> bool:
        return slot.position.examples_seen >= self.axis.rung_examples(slot.settings, rung)

    def _next_batch(self, slot: Slot) -> None:
        seed = slot.run.order_seed
        axis = self.axis if seed is None else replace(self.axis, seed=seed)
        slot.begin_batch(axis.batch(slot.position.examples_seen, slot.settings))

    def _measure(self, due: Sequence[tuple[int, Slot]]) -> list[Measurement]:
        values = self._evaluate(due)
        return [
            m
            for (index, slot), value in zip(due, values, strict=True)
            if value is not None and self.slots[index] is slot
            for m in self._for_one(slot, partial(self._rungs, index, slot, value)) or ()
        ]

    def _evaluate(self, due: Sequence[tuple[int, Slot]]) -> list[RowScores | None]:
        """Return each slot's scores of the validation rows, packed or else one by one; None for a slot that
        fails alone."""
        if len(due) > 1:
            try:
                return list(self.scores([index for index, _ in due], self.splits.validation))
            except Exception as error:  # noqa: BLE001  (whose fault it was shows when each runs alone)
                logger.warning(
                    "an evaluation failed: %s; its trials are run again one by one", self._explain(error)
                )
        rows = self.splits.validation
        values = [self._for_one(slot, partial(self.scores, [index], rows)) for index, slot in due]
        return [value[0] if value else None for value in values]

    def place(self, settings: TrialSettings, adapter: Path, free: int = 0) -> int:
        """Load a finished adapter into a free slot for `scores`, the first or a later one (``free``); return
        the slot. `bank.release` empties it. Raises DamagedFileError."""
        index = [i for i, slot in enumerate(self.slots) if slot is None][free]
        names = self.resolve_targets(settings.target_modules)
        weights, _ = read_peft(adapter)
        self.bank.place(index, settings, names, weights)
        return index

    def scores(self, slots: Sequence[int | None], rows: Sequence[Example]) -> list[RowScores]:
        """Return each slot's scores of the rows; slot None is the bare base."""
        shared = self.num_shared if rows is self.splits.validation else shareable_tokens(self.model, rows)
        while True:
            try:
                return score_rows(self.model, slots, rows, self.tokens_per_pass, shared, self.after_pass)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            longest = int(lengths_of(rows).max())
            self._halve_passes(len(rows) if self.tokens_per_pass > longest else 1)

    def _rungs(self, index: int, slot: Slot, scores: RowScores) -> list[Measurement]:
        """Record every rung that the trial's last step passed; a step may span several."""
        steps = slot.step_records()
        perplexity = scores.perplexity
        finite = math.isfinite(perplexity) and all(math.isfinite(s.loss + s.grad_norm) for s in steps)
        perplexity = perplexity if finite else math.nan
        slot.last_loss, slot.last_perplexity = sum(s.loss for s in steps) / len(steps), perplexity
        measurements: list[Measurement] = []
        while self._has_reached(slot, slot.position.rung + 1):
            if slot.reach_rung(perplexity):
                self.keeper.keep_best(index, slot, scores)
            ended, detail = slot.ending(finite)
            new_steps = () if measurements else steps
            measurements.append(
                slot.measurement(perplexity, new_steps, ended, detail, self.tokens_per_second)
            )
            if ended:
                self.keeper.finish(slot)
                return measurements
        self.keeper.save(index, slot)
        slot.steps.clear()
        slot.laps.clear()
        self._next_batch(slot)
        return measurements
