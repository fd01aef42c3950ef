"""How long passes take, without waiting: a GPU runs behind the host, so events go into its stream."""

import time
from collections import deque

import torch

RECENT_PASSES = 16


class Lap:
    """The time from its making to `stop`. Reading ``seconds`` waits until the device has come that far."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._stop = self._now()

    def stop(self) -> None:
        self._stop = self._now()

    @property
    def is_over(self) -> bool:
        return isinstance(self._stop, float) or bool(self._stop.query())

    @property
    def seconds(self) -> float:
        if isinstance(self._start, float) or isinstance(self._stop, float):
            return float(self._stop) - float(self._start)  # type: ignore[arg-type]  # both are
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) / 1e3

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Throughput:
    """Tokens per second over the last passes that are over; 0 before the first."""

    def __init__(self) -> None:
        self._passes: deque[tuple[Lap, int]] = deque(maxlen=RECENT_PASSES)

    def note(self, lap: Lap, num_tokens: int) -> None:
        self._passes.append((lap, num_tokens))

    @property
    def tokens_per_second(self) -> float:
        over = [(lap.seconds, tokens) for lap, tokens in self._passes if lap.is_over]
        return sum(tokens for _, tokens in over) / sum(s for s, _ in over) if over else 0.0
