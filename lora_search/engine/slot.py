"""One trial in training: its position on the data axis, the rest of its batch, its measurements."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from lora_search.data.rows import Example
from lora_search.engine.packed_model import SlotRows, num_completion_tokens
from lora_search.files.checkpoint import Position
from lora_search.ops.device import Lap
from lora_search.trial import EndReason, Measurement, SlotView, StepRecord, TrialRun, TrialSettings


@dataclass
class Batch:
    """An effective batch in progress: the remaining rows as (example, ordinal), and the sums so far."""

    rows: deque[tuple[Example, int]]
    num_examples: int
    weight: float  # of all completion tokens, each counted as its row's weight says
    losses: list[torch.Tensor] = field(default_factory=list)
    num_tokens: int = 0
    laps: list[tuple[Lap, float]] = field(default_factory=list)  # the passes and this batch's share of each


class Watch:
    """Detects non-finite steps without synchronising: on CUDA they show some steps later."""

    def __init__(self) -> None:
        self._in_flight: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._has_diverged = False

    def note(self, value: torch.Tensor) -> None:
        """Start copying a step's loss plus gradient norm to the host."""
        seen = torch.empty((), dtype=value.dtype, pin_memory=value.is_cuda)
        seen.copy_(value, non_blocking=True)
        copied = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None
        self._in_flight.append((seen, copied))

    @property
    def has_diverged(self) -> bool:
        while self._in_flight and is_copied(self._in_flight[0][1]):
            value, _ = self._in_flight.popleft()
            self._has_diverged = self._has_diverged or not math.isfinite(value.item())
        return self._has_diverged


def is_copied(copied: torch.cuda.Event | None) -> bool:
    """Return whether a copy to the host is done; None is a copy within the host."""
    return copied is None or bool(copied.query())


@dataclass(eq=False)
class Slot:
    """A trial that trains. ``steps`` holds (examples seen, loss, lr, gradient norm) since the last rung."""

    run: TrialRun
    names: tuple[str, ...]
    position: Position
    total_steps: int
    num_bytes: int = 0  # of its row and moments
    batch: Batch = field(init=False)
    train_tokens: int = 0
    laps: list[tuple[Lap, float]] = field(default_factory=list)  # since the last rung
    steps: list[tuple[int, torch.Tensor, float, torch.Tensor]] = field(default_factory=list)
    last_loss: float | None = None
    last_perplexity: float | None = None
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # the adapter of the best rung, on the host
    recovery: str = ""  # what was wrong with its checkpoint, until the next measurement reports it
    watch: Watch = field(default_factory=Watch)

    @property
    def settings(self) -> TrialSettings:
        return self.run.settings

    def begin_batch(self, examples: Sequence[Example]) -> None:
        """Queue an effective batch from its start."""
        seen = self.position.examples_seen
        rows = deque((row, seen + i) for i, row in enumerate(examples))
        self.batch = Batch(rows, len(rows), sum(row.weight * num_completion_tokens(row) for row in examples))

    def take(self, index: int, count: int) -> SlotRows:
        """Return this slot's next rows for a pass."""
        rows = [self.batch.rows.popleft() for _ in range(count)]
        examples, ordinals = [row for row, _ in rows], [ordinal for _, ordinal in rows]
        return SlotRows(
            index,
            examples,
            self.run.seed,
            ordinals,
            self.settings.dropout,
            noise=self.settings.neftune_alpha,
            label_smoothing=self.settings.label_smoothing,
        )

    def end_step(self, lr: float, grad_norm: torch.Tensor) -> None:
        """Record the batch's optimizer step."""
        batch, position = self.batch, self.position
        seen = position.examples_seen + batch.num_examples
        loss = torch.stack(batch.losses).sum()
        self.steps.append((seen, loss, lr, grad_norm))
        self.watch.note(loss + grad_norm.to(loss.device, non_blocking=True))
        self.position = replace(position, examples_seen=seen, optimizer_steps=position.optimizer_steps + 1)
        self.train_tokens += batch.num_tokens
        self.laps += batch.laps

    def step_records(self) -> tuple[StepRecord, ...]:
        """Return the steps since the last rung, in one synchronisation."""
        losses = torch.stack([loss for _, loss, _, _ in self.steps]).tolist()
        norms = torch.stack([norm for _, _, _, norm in self.steps]).tolist()
        return tuple(
            StepRecord(examples_seen=seen, loss=loss, lr=lr, grad_norm=norm)
            for (seen, _, lr, _), loss, norm in zip(self.steps, losses, norms, strict=True)
        )

    def reach_rung(self, perplexity: float) -> bool:
        """Move to the next rung; return whether it is the best so far. A value that the study has is kept."""
        rung = self.position.rung + 1
        perplexity = self.run.perplexities.get(rung, perplexity)
        curve = (*self.position.curve, (self.position.examples_seen, perplexity))
        self.position = replace(self.position, rung=rung, train_tokens=self.train_tokens, curve=curve)
        counts = self.run.last_rung is not None and math.isfinite(perplexity)
        if not (counts or perplexity < self.position.best_perplexity):  # nor is NaN
            return False
        self.position = replace(self.position, best_rung=rung, best_perplexity=perplexity)
        return True

    def measurement(
        self,
        perplexity: float,
        steps: tuple[StepRecord, ...] = (),
        ended: EndReason | None = None,
        detail: str = "",
        tokens_per_second: float = 0.0,
    ) -> Measurement:
        """Return the trial's measurement at its current rung."""
        position, recovery = self.position, self.recovery
        self.recovery = ""
        return Measurement(
            trial_number=self.run.number,
            rung=position.rung,
            examples_seen=position.examples_seen,
            train_tokens=self.train_tokens,
            train_seconds=sum(lap.seconds * share for lap, share in self.laps) if steps else 0.0,
            tokens_per_second=tokens_per_second,
            validation_loss=math.log(perplexity),
            perplexity=perplexity,
            best_rung=position.best_rung,
            best_perplexity=position.best_perplexity,
            steps=steps,
            ended=ended,
            detail=detail,
            recovery=recovery,
        )

    def diverge(self) -> Measurement:
        """Return the end of a trial whose numbers are no longer finite, before its next rung."""
        rung, step = self.position.rung + 1, self.position.optimizer_steps
        detail = f"loss or gradient not finite at optimizer step {step}, before rung {rung}"
        self.position = replace(self.position, rung=rung)
        return self.measurement(math.nan, self.step_records(), "diverged", detail)

    def missing_measurements(self) -> list[Measurement]:
        """Return the rungs that the checkpoint has and the study lacks: the worker died in between."""
        position, missing = self.position, []
        for rung, (seen, perplexity) in enumerate(position.curve, start=1):
            if rung not in self.run.perplexities:
                upto = position.curve[:rung]
                best = min(range(rung), key=lambda i: (upto[i][1], i))
                self.position = replace(
                    position, rung=rung, examples_seen=seen, best_rung=best + 1, best_perplexity=upto[best][1]
                )
                missing.append(self.measurement(perplexity))
        self.position = position
        return missing

    def ending(self, finite: bool) -> tuple[EndReason | None, str]:
        """Return why the trial ends at its current rung, as a reason and a text; None if it continues."""
        position, patience = self.position, self.settings.early_stopping_patience
        if not finite:
            return "diverged", f"loss, gradient or validation not finite at rung {position.rung}"
        if position.rung == (self.run.last_rung or self.settings.num_rungs):
            return "finished", ""
        if patience is not None and position.rung - position.best_rung >= patience:
            since = f"since rung {position.best_rung}"
            return "early_stopped", f"no better validation perplexity for {patience} rungs {since}"
        return None, ""

    def view(self, next_rung_examples: float) -> SlotView:
        """Return the slot's state for display."""
        batch = self.batch
        return SlotView(
            trial_number=self.run.number,
            settings=self.settings,
            rung=self.position.rung,
            examples_seen=self.position.examples_seen + batch.num_examples - len(batch.rows),
            next_rung_examples=int(next_rung_examples),
            loss=self.last_loss,
            perplexity=self.last_perplexity,
        )


class Queue:
    """Trials that wait for a slot or for memory. The first goes first, so none waits for ever: it fits when
    enough of the others have left, and beside none it always does. ``most_bytes``: what all trials in slots
    may take together; None: without a limit."""

    def __init__(self, most_bytes: int | None) -> None:
        self.most_bytes = most_bytes
        self.waiting: deque[Slot] = deque()

    def next(self, busy: Sequence[Slot]) -> Slot | None:
        """Take the first trial from the queue if it fits beside those in slots."""
        if not self.waiting or not self._fits(self.waiting[0], busy):
            return None
        return self.waiting.popleft()

    def push_back(self, slot: Slot, busy: Sequence[Slot]) -> None:
        """Let a trial for which memory ran out wait until another has left: together they are too much."""
        self.waiting.appendleft(slot)
        together = sum(other.num_bytes for other in busy) + slot.num_bytes
        self.most_bytes = min(together - 1, self.most_bytes or together)

    def drop(self, trial_numbers: Sequence[int]) -> None:
        """Forget these trials."""
        self.waiting = deque(slot for slot in self.waiting if slot.run.number not in trial_numbers)

    def _fits(self, slot: Slot, busy: Sequence[Slot]) -> bool:
        if not busy or self.most_bytes is None:
            return True
        return sum(other.num_bytes for other in busy) + slot.num_bytes <= self.most_bytes
