"""Trains many trials at once over one frozen base and yields what they measure. Knows no Optuna, no W&B.

`advance` runs one packed pass; a slot steps when its own effective batch is complete and is evaluated when it
reaches a rung. A trial's numbers do not depend on its slot, its neighbours, or how batches are cut into
passes.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from lora_search.checkpoint import Position, load_checkpoint, save_checkpoint
from lora_search.config import ALL_LINEAR, SweepConfig
from lora_search.data import Example, Splits, epoch_order
from lora_search.lora import SlotBank, export_peft
from lora_search.model import Base, matches, target_layers
from lora_search.optim import SlotAdamW, learning_rate
from lora_search.packing import fill_pass
from lora_search.passes import PackedModel, SlotRows, num_completion_tokens
from lora_search.space import Space, largest, possible_targets
from lora_search.trial import EndReason, Measurement, SlotView, StepRecord, TrialRun, TrialSettings


@dataclass
class Slot:
    """One trial in training. The queue holds what is left of the effective batch: (example, ordinal)."""

    run: TrialRun
    names: tuple[str, ...]
    position: Position
    total_steps: int
    queue: deque[tuple[Example, int]] = field(default_factory=deque)
    batch_examples: int = 0
    batch_completion_tokens: int = 0
    batch_loss: list[torch.Tensor] = field(default_factory=list)
    train_tokens: int = 0
    train_seconds: float = 0.0
    steps: list[tuple[int, torch.Tensor, float, torch.Tensor]] = field(default_factory=list)
    last_loss: float | None = None
    last_perplexity: float | None = None

    @property
    def settings(self) -> TrialSettings:
        return self.run.settings


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
        self.optimizer = SlotAdamW(bank.theta_SP, bank.grad_SP)
        self.data_seed, self.tokens_per_pass, self.base_path = data_seed, tokens_per_pass, base_path
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
            slot = Slot(run=run, names=names, position=position, total_steps=self._total_steps(run.settings))
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
        """Run one packed pass; return the measurements of the trials that reached a rung in it."""
        active = [(index, slot) for index, slot in enumerate(self.slots) if slot is not None]
        taken = fill_pass(
            [[len(e.input_ids) for e, _ in slot.queue] for _, slot in active], self.tokens_per_pass
        )
        packed = [
            (i, slot, self._take(i, slot, count))
            for (i, slot), count in zip(active, taken, strict=True)
            if count
        ]
        self._forward_backward(packed)
        due = [(index, slot) for index, slot, _ in packed if not slot.queue and self._step(index, slot)]
        measurements = self._measure(due)
        self.release([m.trial_number for m in measurements if m.ended])
        return measurements

    def evaluate_base(self) -> float:
        """Return the validation perplexity of the bare base."""
        return self._perplexities([(None, self.splits.validation)])[0]

    def views(self) -> list[SlotView]:
        """Return what each busy slot is doing."""
        return [self._view(slot) for slot in self.slots if slot is not None]

    def _take(self, index: int, slot: Slot, count: int) -> SlotRows:
        rows = [slot.queue.popleft() for _ in range(count)]
        examples, ordinals = [row for row, _ in rows], [ordinal for _, ordinal in rows]
        return SlotRows(index, examples, slot.run.seed, ordinals, slot.settings.dropout)

    def _forward_backward(self, packed: Sequence[tuple[int, Slot, SlotRows]]) -> None:
        start = time.perf_counter()
        nlls = self.model.train_nll([rows for _, _, rows in packed])
        losses = [
            nll.sum() / slot.batch_completion_tokens for nll, (_, slot, _) in zip(nlls, packed, strict=True)
        ]
        torch.stack(losses).sum().backward()
        seconds = time.perf_counter() - start
        tokens = sum(rows.num_tokens for _, _, rows in packed)
        self.tokens_per_second = tokens / seconds
        for loss, (_, slot, rows) in zip(losses, packed, strict=True):
            slot.batch_loss.append(loss.detach())
            slot.train_tokens += rows.num_tokens
            slot.train_seconds += seconds * rows.num_tokens / tokens

    def _step(self, index: int, slot: Slot) -> bool:
        """Take the optimizer step of a complete effective batch; return whether a rung is reached."""
        step = slot.position.optimizer_steps
        lr = learning_rate(slot.settings, step, slot.total_steps)
        grad_norm = self.optimizer.step(index, slot.settings, lr)
        self.bank.refresh(index)
        seen = slot.position.examples_seen + slot.batch_examples
        slot.steps.append((seen, torch.stack(slot.batch_loss).sum(), lr, grad_norm))
        slot.position = replace(slot.position, examples_seen=seen, optimizer_steps=step + 1)
        if seen >= self._rung_examples(slot.settings, slot.position.rung + 1):
            return True
        self._next_batch(slot)
        return False

    def _measure(self, due: Sequence[tuple[int, Slot]]) -> list[Measurement]:
        perplexities = self._perplexities([(index, self.splits.validation) for index, _ in due])
        measurements = []
        for (index, slot), perplexity in zip(due, perplexities, strict=True):
            measurements += self._rungs(index, slot, perplexity)
        return measurements

    def _rungs(self, index: int, slot: Slot, perplexity: float) -> list[Measurement]:
        """Record every rung that the trial's last step passed: more than one where a step spans several."""
        steps = _step_records(slot)
        finite = math.isfinite(perplexity) and all(math.isfinite(s.loss + s.grad_norm) for s in steps)
        perplexity = perplexity if finite else math.nan
        slot.last_loss, slot.last_perplexity = sum(s.loss for s in steps) / len(steps), perplexity
        measurements: list[Measurement] = []
        while self._rung_examples(slot.settings, slot.position.rung + 1) <= slot.position.examples_seen:
            self._record_rung(index, slot, perplexity)
            ended, detail = self._ending(slot, finite)
            measurements.append(
                self._measurement(slot, perplexity, () if measurements else steps, ended, detail)
            )
            if ended:
                return measurements
        self._save(index, slot)
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

    def _ending(self, slot: Slot, finite: bool) -> tuple[EndReason | None, str]:
        position, patience = slot.position, slot.settings.early_stopping_patience
        if not finite:
            return "diverged", f"loss or gradient not finite before rung {position.rung}"
        if position.rung == slot.settings.num_rungs:
            return "finished", ""
        if patience is not None and position.rung - position.best_rung >= patience:
            return (
                "early_stopped",
                f"no better validation perplexity for {patience} rungs since rung {position.best_rung}",
            )
        return None, ""

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

    def _perplexities(self, jobs: Sequence[tuple[int | None, Sequence[Example]]]) -> list[float]:
        """Return exp(mean NLL over all completion tokens), token-weighted, of each job: (slot, rows)."""
        queues = [deque(rows) for _, rows in jobs]
        sums = [torch.zeros((), dtype=torch.float64, device=self.model.device) for _ in jobs]
        while any(queues):
            taken = fill_pass(
                [[len(row.input_ids) for row in queue] for queue in queues], self.tokens_per_pass
            )
            chosen = [i for i, count in enumerate(taken) if count]
            packs = [
                SlotRows(jobs[i][0], [queues[i].popleft() for _ in range(taken[i])]) for i in chosen
            ]
            for i, nll in zip(chosen, self.model.eval_nll(packs), strict=True):
                sums[i] += nll.sum(dtype=torch.float64)
        counts = [sum(num_completion_tokens(row) for row in rows) for _, rows in jobs]
        return [_exp(total.item() / count) for total, count in zip(sums, counts, strict=True)]

    def _next_batch(self, slot: Slot) -> None:
        """Queue the next effective batch; an epoch's last one may be smaller, and none spans two epochs."""
        num_examples = len(self.splits.train)
        epoch, offset = divmod(slot.position.examples_seen, num_examples)
        order = epoch_order(num_examples, self.data_seed, epoch)[
            offset : offset + slot.settings.examples_per_step
        ]
        rows = [self.splits.train[i] for i in order]
        slot.queue = deque((row, slot.position.examples_seen + i) for i, row in enumerate(rows))
        slot.batch_examples = len(rows)
        slot.batch_completion_tokens = sum(num_completion_tokens(row) for row in rows)
        slot.batch_loss = []

    def _rung_examples(self, settings: TrialSettings, rung: int) -> float:
        """Return the examples seen at a rung; there is none after the last."""
        if rung > settings.num_rungs:
            return math.inf
        return math.ceil(rung * len(self.splits.train) / settings.evals_per_epoch)

    def _total_steps(self, settings: TrialSettings) -> int:
        return settings.epochs * math.ceil(len(self.splits.train) / settings.examples_per_step)

    def _save(self, index: int, slot: Slot) -> None:
        rows = {
            "theta": self.bank.theta_SP,
            "m": self.optimizer.exp_avg_SP,
            "v": self.optimizer.exp_avg_sq_SP,
        }
        state = {
            f"{kind}/{name}": tensor
            for kind, bank_SP in rows.items()
            for name, tensor in self.bank.tensors(bank_SP[index], slot.settings.r, slot.names).items()
        }
        save_checkpoint(Path(slot.run.folder) / "checkpoint", slot.position, state)

    def _resume(self, index: int, run: TrialRun, names: tuple[str, ...]) -> Position:
        found = load_checkpoint(Path(run.folder) / "checkpoint")
        if found is None:
            return Position(
                examples_seen=0,
                optimizer_steps=0,
                rung=0,
                train_tokens=0,
                best_rung=0,
                best_perplexity=math.inf,
            )
        position, state = found
        rows = {
            "theta": self.bank.theta_SP,
            "m": self.optimizer.exp_avg_SP,
            "v": self.optimizer.exp_avg_sq_SP,
        }
        for kind, bank_SP in rows.items():
            part = {
                name.partition("/")[2]: tensor
                for name, tensor in state.items()
                if name.startswith(f"{kind}/")
            }
            self.bank.load(bank_SP[index], run.settings.r, names, part)
        self.bank.refresh(index)
        self.optimizer.steps[index] = position.optimizer_steps
        return position

    def _view(self, slot: Slot) -> SlotView:
        next_rung = self._rung_examples(slot.settings, slot.position.rung + 1)
        return SlotView(
            trial_number=slot.run.number,
            settings=slot.settings,
            rung=slot.position.rung,
            examples_seen=slot.position.examples_seen + slot.batch_examples - len(slot.queue),
            next_rung_examples=int(next_rung),
            loss=slot.last_loss,
            perplexity=slot.last_perplexity,
        )


def build_engine(config: SweepConfig, space: Space, base: Base, splits: Splits) -> Engine:
    """Return an engine with room for every trial of the space. Raises ModelError where a target does not
    exist."""
    layers: dict[str, nn.Linear] = {}
    for targets in possible_targets(config, space):
        layers |= target_layers(base.model, targets)
    layers = {
        name: layer for name, layer in target_layers(base.model, (ALL_LINEAR,)).items() if name in layers
    }
    bank = SlotBank(base.model, layers, config.engine.slots, largest(config, space, "lora.r"), base.dtype)
    return Engine(
        PackedModel(base.model, bank),
        bank,
        splits,
        data_seed=config.seed,
        tokens_per_pass=config.engine.tokens_per_pass,
        base_path=base.source,
        resolve_targets=lambda targets: tuple(name for name in layers if matches(name, targets)),
    )


def _step_records(slot: Slot) -> tuple[StepRecord, ...]:
    """Bring the steps since the last rung to the host, in one synchronisation."""
    losses = torch.stack([loss for _, loss, _, _ in slot.steps]).tolist()
    norms = torch.stack([norm for _, _, _, norm in slot.steps]).tolist()
    return tuple(
        StepRecord(examples_seen=seen, loss=loss, lr=lr, grad_norm=norm)
        for (seen, _, lr, _), loss, norm in zip(slot.steps, losses, norms, strict=True)
    )


def _exp(mean_nll: float) -> float:
    """Return exp, or infinity where a float overflows."""
    return math.exp(mean_nll) if mean_nll < 700 else math.inf
