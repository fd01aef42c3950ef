"""Packed against alone, step by step, and exported adapters in plain PEFT."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn import functional as F

from lora_search.data.rows import Example, Splits
from lora_search.engine.build import Room, build_engine
from lora_search.engine.engine import Engine
from lora_search.model.loading import Base
from lora_search.trial import Measurement, TrialRun, TrialSettings
from tests.benchmarks.gpu.packed import Figures
from tests.benchmarks.gpu.shapes import (
    Q_AND_V,
    Scale,
    random_base,
    random_model,
    random_splits,
    restore_rotary,
    sweep_config,
    trials,
)
from tests.benchmarks.gpu.speed import release_memory

NUM_TRIALS, BATCH, STEPS, LR = 4, 4, 8, 2e-3
Curves = dict[int, list[Measurement]]


def exactness(scale: Scale, dtype: torch.dtype) -> Figures:
    """Return largest relative differences: packed to alone, alone to alone again, ours to plain PEFT."""
    name = str(dtype).removeprefix("torch.")
    vocabulary = scale.small["vocab_size"]
    splits = random_splits(BATCH * STEPS, scale.small_row, vocabulary)
    base, room = random_base(scale.small, scale, dtype), trials(NUM_TRIALS, Q_AND_V, BATCH, lr=LR)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        packed = train(base, splits, room, NUM_TRIALS, place / "packed")
        alone, again = (train(base, splits, room, 1, place / part) for part in ("alone", "again"))
        theirs = [
            plain_perplexity(scale, dtype, base, place / "packed" / str(i) / "adapter", splits.validation)
            for i in range(NUM_TRIALS)
        ]
    ours = [packed[i][-1].best_perplexity for i in range(NUM_TRIALS)]
    steps = f"{NUM_TRIALS} trials of {STEPS} steps"
    return {
        f"exact.{name}": (difference(packed, alone), steps),
        f"noise.{name}": (difference(again, alone), "one trial alone, twice"),
        f"peft.{name}": (
            max(abs(a / b - 1.0) for a, b in zip(ours, theirs, strict=True)),
            f"perplexity {ours[0]:.1f}",
        ),
    }


def train(base: Base, splits: Splits, room: list[TrialSettings], slots: int, folder: Path) -> Curves:
    """Return what every trial measured, so many of them at once."""
    release_memory(base.device)
    engine, _ = build_engine(sweep_config(slots, 4096), Room.of(room), base, splits, {})
    waiting = [
        TrialRun(number=i, seed=i, settings=s, folder=str(folder / str(i))) for i, s in enumerate(room)
    ]
    curves: Curves = {run.number: [] for run in waiting}
    try:
        while waiting or engine.free_slots < len(engine.slots):
            _advance(engine, waiting, curves)
    finally:
        engine.bank.remove(base.model)
    return curves


def _advance(engine: Engine, waiting: list[TrialRun], curves: Curves) -> None:
    engine.admit([waiting.pop(0) for _ in range(min(engine.free_slots, len(waiting)))])
    for measurement in engine.advance():
        curves[measurement.trial_number].append(measurement)
        if measurement.ended != "finished":
            raise RuntimeError(f"trial {measurement.trial_number} {measurement.ended}: {measurement.detail}")


def difference(curves: Curves, others: Curves) -> float:
    """Return the largest relative difference of a step's loss."""
    losses = [
        torch.tensor([step.loss for i in sorted(c) for m in c[i] for step in m.steps], dtype=torch.float64)
        for c in (curves, others)
    ]
    if len(losses[0]) != NUM_TRIALS * STEPS:
        raise RuntimeError(f"{len(losses[0])} steps instead of {NUM_TRIALS * STEPS}")
    return float(((losses[0] - losses[1]).abs() / losses[1].abs()).max())


@torch.no_grad()
def plain_perplexity(
    scale: Scale, dtype: torch.dtype, base: Base, adapter: Path, rows: tuple[Example, ...]
) -> float:
    """Return what an exported adapter gives in plain PEFT, row by row, over the same random weights."""
    restore_rotary()
    bare = random_model(scale.small, scale, dtype)
    pairs = zip(bare.parameters(), base.model.parameters(), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise RuntimeError("the random weights are not the same twice")
    model, total = PeftModel.from_pretrained(bare, str(adapter)), 0.0
    for row in rows:
        ids = torch.tensor([row.input_ids], device=scale.device)
        logits = model(input_ids=ids).logits[0, row.num_prompt_tokens - 1 : -1]
        total += F.cross_entropy(logits.float(), ids[0, row.num_prompt_tokens :], reduction="sum").item()
    return float(torch.tensor(total / sum(len(r.input_ids) - r.num_prompt_tokens for r in rows)).exp())
