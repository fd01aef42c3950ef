"""Our engine: many small trials packed against one alone, a large model against the device's matmul rate, and
predicted against measured memory."""

import torch

from lora_search.data.rows import Splits
from lora_search.engine.autosize import Fit, _fill, _peak_bytes
from lora_search.engine.build import Room, _fit
from lora_search.engine.engine import Engine
from lora_search.engine.packed_model import SlotRows
from lora_search.model.loading import Base
from lora_search.model.targets import target_layers
from lora_search.ops.recompute import recompute_layers
from lora_search.settings.schema import SweepConfig
from lora_search.trial import TrialSettings
from tests.benchmarks.gpu.shapes import (
    ALL_LAYERS,
    LORA_BATCH,
    Q_AND_V,
    Scale,
    one_trial,
    random_splits,
    sweep_config,
    trials,
)
from tests.benchmarks.gpu.speed import engine_for, matmul_flops, rate, release_memory, strip_adapters

Figures = dict[str, tuple[float, str]]  # key -> value, remark


def small_splits(scale: Scale) -> Splits:
    return random_splits(scale.num_rows, scale.small_row, scale.small["vocab_size"])


def large_splits(scale: Scale) -> Splits:
    return random_splits(scale.num_rows // 4, scale.large_row, scale.large["vocab_size"])


def small_packed(base: Base, scale: Scale, batch_size: int) -> Figures:
    """Return the rate of all trials packed, and the share of time within passes."""
    room = trials(scale.num_trials, Q_AND_V, batch_size)
    config = sweep_config(scale.num_trials, scale.tokens_per_pass)
    with engine_for(base, config, small_splits(scale), room, len(room)) as engine:
        measured = rate(engine, scale.window_seconds)
        remark = f"{len(room)} slots, passes of up to {engine.tokens_per_pass} tokens"
    return {
        f"small.{batch_size}.packed": (measured.tokens_per_second, remark),
        f"small.{batch_size}.in_passes": (measured.in_passes, ""),
    }


def small_alone(base: Base, scale: Scale, batch_size: int) -> Figures:
    """Return the rate of one trial in an engine of one slot."""
    trial = one_trial(Q_AND_V, batch_size)
    config = sweep_config(1, scale.tokens_per_pass)
    with engine_for(base, config, small_splits(scale), [trial], 1) as engine:
        measured = rate(engine, scale.window_seconds)
    return {f"small.{batch_size}.alone": (measured.tokens_per_second, f"one slot, r {trial.r}")}


def matmul(base: Base, scale: Scale) -> Figures:
    flops = matmul_flops(scale.cube, scale.dtype, scale.device)
    parameters = sum(p.numel() for p in base.model.parameters())
    return {
        "matmul": (flops, f"{scale.cube} cube"),
        "large.parameters": (float(parameters), ""),
    }


def large_fitted(base: Base, scale: Scale, is_recomputed: bool) -> Figures:
    """Return rate and memory with slots and tokens that the probe chose."""
    if is_recomputed:
        recompute_layers(base.model)
    release_memory(scale.device)
    before = torch.cuda.memory_allocated(scale.device) if scale.device.type == "cuda" else 0
    room, splits = trials(scale.num_trials, ALL_LAYERS, LORA_BATCH), large_splits(scale)
    chosen = choose(base, splits, room, sweep_config("auto", "auto", is_recomputed))
    name = "recomputed" if is_recomputed else "large"
    config = sweep_config(chosen.slots, chosen.tokens_per_pass, is_recomputed)
    with engine_for(base, config, splits, room, chosen.slots) as engine:
        measured = rate(engine, scale.window_seconds)
        peak = peak_bytes(engine, splits, before)
        tokens = engine.tokens_per_pass
    remark = f"{chosen.slots} slots, passes of {tokens} tokens (probe: {chosen.tokens_per_pass})"
    assert chosen.predicted_bytes is not None
    return {
        f"{name}.rate": (measured.tokens_per_second, remark),
        f"{name}.in_passes": (measured.in_passes, ""),
        f"{name}.predicted": (float(chosen.predicted_bytes), chosen.note),
        f"{name}.peak": (float(peak), "beside the base"),
    }


def choose(base: Base, splits: Splits, room: list[TrialSettings], config: SweepConfig) -> Fit:
    strip_adapters(base.model)
    return _fit(config, Room.of(room), base, splits, target_layers(base.model, ALL_LAYERS))


def peak_bytes(engine: Engine, splits: Splits, before: int) -> int:
    """Return what training took at its peak, beside the base and the head's buffers, as the probe counts it.

    On a CPU it is what a full pass keeps for its way back, which is what the probe counts there.
    """
    device, head = engine.model.device, engine.model.head
    if device.type == "cuda":
        buffers = head.logits_NV.nbytes + head.block_NV.nbytes
        return int(torch.cuda.max_memory_allocated(device)) - before - buffers
    longest = sorted(splits.train, key=lambda row: len(row.input_ids), reverse=True)
    rows = _fill(longest, engine.tokens_per_pass)
    pack = SlotRows(0, rows, 0, range(len(rows)), dropout=0.05)
    slots = [slot for slot in engine.slots if slot is not None]
    held = sum(engine.bank.bytes_of(slot.settings, slot.names) for slot in slots)
    return _peak_bytes(engine.model, pack) + held


def large_without_dropout(base: Base, scale: Scale) -> Figures:
    """Return the rate of trials without dropout: what making its masks costs."""
    room, splits = trials(scale.num_trials, ALL_LAYERS, LORA_BATCH, dropout=0.0), large_splits(scale)
    chosen = choose(base, splits, room, sweep_config("auto", "auto"))
    config = sweep_config(chosen.slots, chosen.tokens_per_pass)
    with engine_for(base, config, splits, room, chosen.slots) as engine:
        measured = rate(engine, scale.window_seconds)
    remark = f"{chosen.slots} slots, passes of {chosen.tokens_per_pass} tokens"
    return {"undropped.rate": (measured.tokens_per_second, remark)}
