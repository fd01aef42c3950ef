"""Rates of an engine on random rows: useful tokens per second, and the share of time in which a pass runs."""

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora_search.data.rows import Splits
from lora_search.engine.bank import SlotLinear
from lora_search.engine.build import Room, build_engine
from lora_search.engine.engine import Engine
from lora_search.model.loading import Base
from lora_search.ops.device import Lap, Throughput
from lora_search.settings.schema import SweepConfig
from lora_search.trial import TrialRun, TrialSettings

WARM_UP, WINDOWS, LEAST_PASSES = 3, 3, 4


@dataclass(frozen=True)
class Rate:
    """Medians over the windows. ``in_passes``: the share of the wall time that lies within a pass."""

    tokens_per_second: float
    in_passes: float


class EveryLap(Throughput):
    """Keeps all passes, not just the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Lap, int]] = []

    def note(self, lap: Lap, num_tokens: int) -> None:
        self.noted.append((lap, num_tokens))


def strip_adapters(model: nn.Module) -> None:
    """Put back the bare layers that a step which failed may have left under adapters."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SlotLinear):
                setattr(module, name, child.base)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Free what nothing refers to any more, and forget the peak so far."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def engine_for(
    base: Base, config: SweepConfig, splits: Splits, room: Sequence[TrialSettings], admitted: int
) -> Iterator[Engine]:
    """Yield an engine with room for these trials, the first of which train; the base is bare again after."""
    strip_adapters(base.model)
    release_memory(base.device)
    engine, _ = build_engine(config, Room.of(room), base, splits, {})
    try:
        with tempfile.TemporaryDirectory() as folder:
            engine.admit(
                [
                    TrialRun(number=i, seed=i, settings=settings, folder=str(Path(folder) / str(i)))
                    for i, settings in enumerate(room[:admitted])
                ]
            )
            yield engine
    finally:
        engine.bank.remove(base.model)


def rate(engine: Engine, window_seconds: float) -> Rate:
    """Return medians of windows of about so many seconds, after a warm-up; the host waits at their ends."""
    laps = engine.throughput = EveryLap()
    _window(engine, laps, WARM_UP)
    seconds, _, _ = _window(engine, laps, LEAST_PASSES)
    passes = max(LEAST_PASSES, math.ceil(window_seconds * LEAST_PASSES / seconds))
    windows = [_window(engine, laps, passes) for _ in range(WINDOWS)]
    return Rate(
        statistics.median(tokens / seconds for seconds, tokens, _ in windows),
        statistics.median(busy / seconds for seconds, _, busy in windows),
    )


def _window(engine: Engine, laps: EveryLap, passes: int) -> tuple[float, int, float]:
    """Return wall seconds, tokens, and seconds within passes."""
    device, first = engine.model.device, len(laps.noted)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(passes):
        ended = engine.advance()
        if ended:
            raise RuntimeError(f"a trial came to its end meanwhile: {ended[0].ended}, {ended[0].detail}")
    synchronize(device)
    seconds, noted = time.perf_counter() - start, laps.noted[first:]
    return seconds, sum(tokens for _, tokens in noted), sum(lap.seconds for lap, _ in noted)


def matmul_flops(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return what a product of two square matrices reaches, in FLOP/s: the median of five windows."""
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out, seconds = torch.empty_like(a), []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 10 * 2 * side**3 / statistics.median(seconds[1:])
