"""One trial in training: its place on the data axis, the rest of its batch, what it has measured."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from lora_search.checkpoint import Position
from lora_search.data import Example
from lora_search.passes import SlotRows, num_completion_tokens
from lora_search.trial import EndReason, SlotView, StepRecord, TrialRun, TrialSettings


@dataclass
class Batch:
    """An effective batch on its way: rows still to go as (example, ordinal), and what has come in so far."""

    rows: deque[tuple[Example, int]]
    num_examples: int
    num_completion_tokens: int
    losses: list[torch.Tensor] = field(default_factory=list)
    num_tokens: int = 0
    seconds: float = 0.0


@dataclass
class Slot:
    """A trial that trains. ``steps`` holds (examples seen, loss, lr, gradient norm) since the last rung."""

    run: TrialRun
    names: tuple[str, ...]
    position: Position
    total_steps: int
    batch: Batch = field(init=False)
    train_tokens: int = 0
    train_seconds: float = 0.0
    steps: list[tuple[int, torch.Tensor, float, torch.Tensor]] = field(default_factory=list)
    is_saved: bool = True  # the checkpoint holds the last rung
    last_loss: float | None = None
    last_perplexity: float | None = None

    @property
    def settings(self) -> TrialSettings:
        return self.run.settings

    def begin_batch(self, examples: Sequence[Example]) -> None:
        """Queue an effective batch from its start."""
        seen = self.position.examples_seen
        rows = deque((row, seen + i) for i, row in enumerate(examples))
        self.batch = Batch(rows, len(rows), sum(num_completion_tokens(row) for row in examples))

    def take(self, index: int, count: int) -> SlotRows:
        """Return the next rows as this slot's part of a pass."""
        rows = [self.batch.rows.popleft() for _ in range(count)]
        examples, ordinals = [row for row, _ in rows], [ordinal for _, ordinal in rows]
        return SlotRows(index, examples, self.run.seed, ordinals, self.settings.dropout)

    def end_step(self, lr: float, grad_norm: torch.Tensor) -> None:
        """Record the optimizer step that the batch led to."""
        batch, position = self.batch, self.position
        seen = position.examples_seen + batch.num_examples
        self.steps.append((seen, torch.stack(batch.losses).sum(), lr, grad_norm))
        self.position = replace(position, examples_seen=seen, optimizer_steps=position.optimizer_steps + 1)
        self.train_tokens += batch.num_tokens
        self.train_seconds += batch.seconds

    def step_records(self) -> tuple[StepRecord, ...]:
        """Bring the steps since the last rung to the host, in one synchronisation."""
        losses = torch.stack([loss for _, loss, _, _ in self.steps]).tolist()
        norms = torch.stack([norm for _, _, _, norm in self.steps]).tolist()
        return tuple(
            StepRecord(examples_seen=seen, loss=loss, lr=lr, grad_norm=norm)
            for (seen, _, lr, _), loss, norm in zip(self.steps, losses, norms, strict=True)
        )

    def ending(self, finite: bool) -> tuple[EndReason | None, str]:
        """Return why the trial ends at the rung it is at, and that in words; None where it goes on."""
        position, patience = self.position, self.settings.early_stopping_patience
        if not finite:
            return "diverged", f"loss or gradient not finite before rung {position.rung}"
        if position.rung == self.settings.num_rungs:
            return "finished", ""
        if patience is not None and position.rung - position.best_rung >= patience:
            since = f"since rung {position.best_rung}"
            return "early_stopped", f"no better validation perplexity for {patience} rungs {since}"
        return None, ""

    def view(self, next_rung_examples: float) -> SlotView:
        """Return what the slot is doing, for people."""
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
