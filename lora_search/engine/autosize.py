"""How many trials and tokens to train at once, from a short probe of memory and speed on this device.

Costs up to ten training passes. Peak memory is modelled as c0 + c1 * tokens + c2 * slots: c2 is known, the
line through the smallest and the largest pass gives c0 and c1. On a GPU the allocator reports what a pass
took; on a CPU the tensors saved for the backward pass are counted. Slots that are chosen are counted by what
the space's trials take on average: `engine` lets a trial wait while what it takes is not free.

A slot puts at most its effective batch into a pass, so few slots cannot fill a large pass, and many slots
leave memory for a small one only: both are chosen together, for the highest speed.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from lora_search.data.rows import Example
from lora_search.data.store import lengths_of, longest_rows
from lora_search.engine.packed_model import PackedModel, SlotRows
from lora_search.errors import LoraSearchError
from lora_search.ops.device import give_back_memory, is_out_of_memory
from lora_search.ops.recompute import decoder_layers, recompute_layers
from lora_search.settings.schema import EngineConfig

MARGIN = {"cuda": 0.85, "cpu": 0.5}  # share of the free memory to plan with
MOST_TOKENS = {"cuda": 16384, "cpu": 2048}  # larger passes of a 1B to 8B (135M) model are no faster
MOST_SLOTS = {"cuda": 32, "cpu": 8}
ENOUGH = 0.95  # the smallest number of slots that reaches this share of the best speed


@dataclass(frozen=True)
class Fit:
    """How much the engine trains at once, and for the log how that was chosen."""

    slots: int
    tokens_per_pass: int
    predicted_bytes: int | None = None
    note: str = ""
    bank_bytes: int | None = None  # what the trials in the slots may take together; None: without a limit


@dataclass(frozen=True)
class Demand:
    """The bytes that a trial takes in a slot: the largest of the space, and the mean."""

    largest: int
    mean: float

    def of(self, slots: int) -> int:
        """Return what to keep for so many slots: the largest trial always finds room."""
        return max(self.largest, math.ceil(slots * self.mean))


@dataclass(frozen=True)
class PassCost:
    """Memory of a training pass as a linear function of its tokens, and tokens per second at some sizes."""

    fixed_bytes: float
    bytes_per_token: float
    speeds: dict[int, float]  # tokens of the pass -> tokens per second

    def speed(self, tokens: float) -> float:
        """Return tokens per second of a pass: between the measured sizes a line, beyond them the nearest."""
        sizes = sorted(self.speeds)
        rising = np.maximum.accumulate([self.speeds[size] for size in sizes])  # a slower one is noise
        return float(np.interp(tokens, sizes, rising))

    def bytes(self, slots: int, tokens: int, demand: Demand) -> float:
        return self.fixed_bytes + self.bytes_per_token * tokens + demand.of(slots)


def fit(
    config: EngineConfig,
    model: PackedModel,
    rows: Sequence[Example],
    batch_size: int,
    demand: Demand,
    most_slots: int,
    free_bytes: int,
) -> Fit:
    """Return slots and tokens per pass as set, or chosen if they are auto.

    ``batch_size`` is the smallest effective one of the space: the rows that any trial can put into a pass.
    ``free_bytes`` is the free memory of the device, of several the least: what a pass and a slot take most on
    any of them must fit it. Slots that are set can all hold the largest trial at once. Raises LoraSearchError
    if a single row does not fit.
    """
    device = model.device.type
    room = MARGIN[device] * free_bytes
    lengths = lengths_of(rows)
    mean, longest = float(lengths.mean()), int(lengths.max())
    sizes = _sizes(config, mean, batch_size, device)
    cost = measure(model, rows, sizes)
    if config.slots != "auto":
        demand = Demand(demand.largest, demand.largest)
    room_for_pass = room - demand.of(1 if config.slots == "auto" else int(config.slots))
    if config.gradient_checkpointing == "auto" and _fitting(cost, room_for_pass) < longest:
        recompute_layers(model.decoder)
        cost = measure(model, rows, sizes) if device == "cuda" else _recomputed(cost, model.decoder)
    limits = Limits(longest, batch_size * mean, min(most_slots, MOST_SLOTS[device]), MOST_TOKENS[device])
    slots, tokens = choose(config, cost, room, demand, limits)
    predicted = cost.bytes(slots, tokens, demand)
    note = _note(slots, tokens, predicted, cost, limits) + _note_on_largest(slots, demand)
    return Fit(slots, tokens, int(predicted), note, demand.of(slots))


@dataclass(frozen=True)
class Limits:
    """What bounds the choice: the longest row and one trial's effective batch in tokens, slots, tokens."""

    longest: int
    batch_tokens: float
    most_slots: int
    most_tokens: int


def choose(
    config: EngineConfig, cost: PassCost, room: float, demand: Demand, limits: Limits
) -> tuple[int, int]:
    """Return the fewest slots, with the tokens that fit beside them, whose passes are about as fast as any.

    ``room`` is the memory to use, in bytes. Raises LoraSearchError if a single row does not fit."""
    options = list(_options(config, cost, room, demand, limits))
    speeds = [cost.speed(min(tokens, slots * limits.batch_tokens)) for slots, tokens in options]
    return next(o for o, speed in zip(options, speeds, strict=True) if speed >= ENOUGH * max(speeds))


def _options(
    config: EngineConfig, cost: PassCost, room: float, demand: Demand, limits: Limits
) -> Iterator[tuple[int, int]]:
    """Yield slots and the most tokens that fit beside them; set tokens are taken for the fewest slots."""
    least = 1 if config.slots == "auto" else int(config.slots)
    most = max(least, limits.most_slots) if config.slots == "auto" else least
    for slots in range(least, most + 1):
        left = room - demand.of(slots)
        if slots == least:
            yield slots, _tokens(config, cost, left, limits.longest, limits.most_tokens)
        elif (fitting := _fitting(cost, left)) < limits.longest:
            return
        elif config.tokens_per_pass == "auto":
            yield slots, min(fitting, limits.most_tokens)
        elif fitting >= int(config.tokens_per_pass):
            yield slots, int(config.tokens_per_pass)


def measure(model: PackedModel, rows: Sequence[Example], sizes: Sequence[int]) -> PassCost:
    """Return the cost of training passes of about these sizes in tokens, on the longest rows.

    Stops at the first size that runs out of memory; if that is the smallest, a token costs all the memory.
    """
    longest = longest_rows(rows, max(sizes))  # a row has a token at least
    used, points = [], {}
    for size in sizes:
        chosen = _fill(longest, size)
        pack = SlotRows(0, chosen, 0, range(len(chosen)), dropout=0.05)
        try:
            used.append((pack.num_tokens, _peak_bytes(model, pack)))
            points[pack.num_tokens] = pack.num_tokens / _seconds(model, pack)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            give_back_memory(model.device)
            break
    if not points:
        return PassCost(math.inf, 1.0, {1: 1.0})
    (few, low), (many, high) = used[0], used[-1]
    slope = max(0.0, (high - low) / (many - few)) if many > few else high / many
    return PassCost(max(0.0, low - slope * few), slope, points)


def _sizes(config: EngineConfig, mean: float, batch_size: int, device: str) -> list[int]:
    """Return the sizes to probe: one trial's batch, or less, and its multiples up to the largest pass."""
    top = MOST_TOKENS[device] // 2 if config.tokens_per_pass == "auto" else int(config.tokens_per_pass)
    sizes = [max(1, min(int(batch_size * mean), top // 16))]
    while sizes[-1] * 2 <= top and len(sizes) < 5:
        sizes.append(sizes[-1] * 2)
    return sizes


def _tokens(config: EngineConfig, cost: PassCost, room: float, longest: int, most: int) -> int:
    if config.tokens_per_pass != "auto":
        return int(config.tokens_per_pass)
    fitting = _fitting(cost, room)
    if fitting < longest:
        needed = (cost.fixed_bytes + cost.bytes_per_token * longest) / 2**30
        amount = f"{needed:.1f} GiB" if math.isfinite(needed) else "more memory than there is"
        raise LoraSearchError(
            f"engine.tokens_per_pass: a row of {longest} tokens needs {amount} on top of the base, and "
            f"{max(room, 0.0) / 2**30:.1f} GiB are left. Lower data.max_length (at most {max(fitting, 0)}) "
            "or lora.r, or take a device with more memory."
        )
    return min(fitting, most)


def _fitting(cost: PassCost, room: float) -> int:
    """Return the most tokens of a pass that fit."""
    return max(0, int(max(room - cost.fixed_bytes, 0.0) / max(cost.bytes_per_token, 1.0)))


def _recomputed(cost: PassCost, decoder: nn.Module) -> PassCost:
    """Return the cost with gradient checkpointing: the inputs of all layers, the activations of one."""
    layers = len(decoder_layers(decoder))
    weight = next(decoder.parameters())
    inputs = layers * weight.shape[-1] * weight.element_size()
    return replace(cost, bytes_per_token=cost.bytes_per_token / layers + inputs)


def _note(slots: int, tokens: int, predicted: float, cost: PassCost, limits: Limits) -> str:
    filled = min(tokens, slots * limits.batch_tokens)
    alone, packed = cost.speed(min(tokens, limits.batch_tokens)), cost.speed(filled)
    return (
        f"{slots} slots, {tokens} tokens per pass, about {predicted / 2**30:.1f} GiB plus the base; probe: "
        f"{packed:.0f} tokens/s, {alone:.0f} for one trial with the smallest batch ({packed / alone:.2f}x)"
    )


def _note_on_largest(slots: int, demand: Demand) -> str:
    together = demand.of(slots) // demand.largest
    return f"; of the largest trials {together} at once" if together < slots else ""


def _fill(rows: Sequence[Example], num_tokens: int) -> list[Example]:
    chosen: list[Example] = []
    total = 0
    while not chosen or total < num_tokens:
        chosen.append(rows[len(chosen) % len(rows)])
        total += len(chosen[-1].input_ids)
    return chosen


def _train(model: PackedModel, pack: SlotRows) -> None:
    model.nll([pack])[0].mean().backward()


def _seconds(model: PackedModel, pack: SlotRows) -> float:
    return _timed(lambda: _train(model, pack), model.devices)


def _timed(work: Callable[[], None], devices: Sequence[torch.device]) -> float:
    _wait_for(devices)
    start = time.perf_counter()
    work()
    _wait_for(devices)
    return time.perf_counter() - start


def _wait_for(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _peak_bytes(model: PackedModel, pack: SlotRows) -> int:
    """Return the peak memory of a training pass, above what is already allocated, on the device where that is
    most."""
    if model.device.type == "cuda":
        before = [torch.cuda.memory_allocated(device) for device in model.devices]
        for device in model.devices:
            torch.cuda.reset_peak_memory_stats(device)
        _train(model, pack)
        peaks = [torch.cuda.max_memory_allocated(device) for device in model.devices]
        return max(int(peak - held) for peak, held in zip(peaks, before, strict=True))
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.decoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.nll([pack])[0].mean()
    kept = sum(size for address, size in sizes.items() if address not in weights)
    with torch.autograd.set_multithreading_enabled(not model.is_row_by_row):  # as in `engine`
        loss.backward()
    return kept
