"""Builds small engines over tiny models, and drives them to the end."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from lora_search.data.rows import Example, Splits
from lora_search.engine.bank import SlotBank
from lora_search.engine.engine import Engine
from lora_search.engine.packed_model import PackedModel
from lora_search.files.peft import BaseRecord, export_peft
from lora_search.model.loading import Base, load_base, resolve_model
from lora_search.model.targets import matches, target_layers
from lora_search.settings.schema import EngineConfig, ModelConfig
from lora_search.trial import Measurement, TrialRun


def random_splits(num_train: int = 12, num_validation: int = 5, seed: int = 0) -> Splits:
    rng = np.random.default_rng(seed)

    def example(*beginning: int) -> Example:
        length = int(rng.integers(6, 24))
        tokens, num_prompt = rng.integers(3, 250, length).tolist(), int(rng.integers(2, length - 2))
        return Example((*beginning, *tokens), len(beginning) + num_prompt)

    train = tuple(example() for _ in range(num_train))
    validation = tuple(example(7, 5, 11) for _ in range(num_validation))  # as after a chat template
    return Splits(train, validation, (), 32, "hash", {})


def with_turns(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Return the examples with a further question in every other one: two tokens that bear no loss."""
    middles = [(e.num_prompt_tokens + len(e.input_ids)) // 2 for e in examples]
    return tuple(
        replace(e, masked=((middle, min(middle + 2, len(e.input_ids) - 1)),)) if i % 2 else e
        for i, (e, middle) in enumerate(zip(examples, middles, strict=True))
    )


def build_engine(
    folder: Path,
    splits: Splits,
    *,
    slots: int = 1,
    tokens_per_pass: int = 64,
    max_rank: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    devices: int = 1,
) -> Engine:
    base = load(folder, dtype, device, devices)
    return engine_over(base.model, folder, splits, slots, tokens_per_pass, max_rank)


def load(folder: Path, dtype: str = "float32", device: str = "cpu", devices: int = 1) -> Base:
    config, engine = ModelConfig(path=str(folder)), EngineConfig(device=device, dtype=dtype)
    engine.devices_per_worker = devices  # refused with engine.device=cpu, where more are the same
    return load_base(resolve_model(config), config, engine)


def engine_over(
    model: PreTrainedModel,
    folder: Path,
    splits: Splits,
    slots: int = 1,
    tokens_per_pass: int = 64,
    max_rank: int = 8,
) -> Engine:
    layers = target_layers(model, ("all-linear",))
    names = tuple(name for name, _ in model.named_modules())
    bank = SlotBank(model, layers, slots, max_rank, model.dtype, trains_rows=True)
    record = BaseRecord(path=str(folder), module_names=names, digest=splits.data_hash)
    return Engine(
        PackedModel(model, bank),
        bank,
        splits,
        data_seed=0,
        tokens_per_pass=tokens_per_pass,
        base=record,
        resolve_targets=lambda targets: tuple(name for name in layers if matches(name, targets)),
    )


def starting_adapter(engine: Engine, run: TrialRun, folder: Path) -> Path:
    """Admit the trial; write its adapter before the first step to the folder, in PEFT's format."""
    engine.admit([run])
    slot, row = engine.slots[0], engine.bank.rows[0]
    assert slot is not None
    start = row.layout.tensors(row.theta)
    export_peft(start, run.settings, slot.names, engine.keeper.base, folder)
    return folder


def train_all(engine: Engine, runs: Sequence[TrialRun]) -> dict[int, list[Measurement]]:
    """Train every trial to its end, admitting as slots come free."""
    waiting, curves = list(runs), {run.number: [] for run in runs}
    while waiting or engine.free_slots < len(engine.slots):
        admitted = [waiting.pop(0) for _ in range(min(engine.free_slots, len(waiting)))]
        engine.admit(admitted)
        for measurement in engine.advance():
            curves[measurement.trial_number].append(measurement)
    return curves
