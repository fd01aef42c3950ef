"""The device: its choice, dtype, free memory, out-of-memory errors and timing."""

import ctypes
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from lora_search.errors import ConfigError
from lora_search.ops.cores import THREADS, num_cores
from lora_search.settings.rules import require_devices

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT_BYTES = 32 * 2**20  # the most that glibc takes
RECENT_PASSES = 16


OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP, MPS, Triton, whichever class they raise
    "STATUS_ALLOC_FAILED",  # CUBLAS_, CUDNN_, CUSPARSE_
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
)
BFLOAT16_CAPABILITY = (8, 0)  # older NVIDIA GPUs (V100, T4) only emulate it


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out: PyTorch has a class for it, other libraries only a message."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in OUT_OF_MEMORY)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next pass. Fresh pages cost 5 % of a pass on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def keep_to_own_cores() -> None:
    """Let torch compute with at most as many threads as this process has cores, which the quota of a
    container may limit; OMP_NUM_THREADS takes precedence. The same for every start on a machine: how many
    threads add up a sum decides its last bits."""
    if THREADS not in os.environ and torch.get_num_threads() > num_cores():
        torch.set_num_threads(num_cores())


def give_back_memory(device: torch.device) -> None:
    """Return freed memory to the device or the operating system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def available_bytes(devices: Sequence[torch.device]) -> int:
    """Return what can still be allocated on each device: the free memory of the fullest GPU, or the machine's
    within its cgroup's limit."""
    if devices[0].type == "cuda":
        torch.cuda.empty_cache()
        return min(int(torch.cuda.mem_get_info(device)[0]) for device in devices)
    machine = int(psutil.virtual_memory().available)
    return min([machine, *_cgroup_room()])


def _cgroup_room(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the memory left in this control group (v2); None if there is no limit."""
    try:
        limit, used = ((root / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return []
    return [] if limit == "max" else [max(0, int(limit) - int(used))]


def pick_device(name: str) -> torch.device:
    """Return the device; auto is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    if name.startswith("cuda") and (torch.device(name).index or 0) >= count:
        raise ConfigError(
            "engine.device", name, f"must be a device of this machine ({count} GPUs)", "Use cpu or auto."
        )
    return torch.device(name)


def pick_devices(name: str, count: int) -> tuple[torch.device, ...]:
    """Return a worker's devices: the first GPUs that it sees. Raises ConfigError if there are too few."""
    if count == 1:
        return (pick_device(name),)
    if name != "cpu":
        require_devices(count, torch.cuda.device_count(), "the GPUs that a worker sees here")
    kind = pick_device(name).type
    return tuple(torch.device(kind, index) for index in range(count))


def devices_of(module: nn.Module) -> tuple[torch.device, ...]:
    """Return the devices that a module's weights are on."""
    return tuple(dict.fromkeys(parameter.device for parameter in module.parameters()))


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the base's dtype; auto picks bfloat16 if the hardware multiplies matrices in it.

    The choice depends on the hardware and not on a timing, so it cannot change between two starts of a sweep.
    Raises ConfigError if bfloat16 is requested on an NVIDIA GPU that only emulates it.
    """
    if device.type == "cuda":
        capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
        return gpu_dtype(name, capability)
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    # AMX or AVX512-BF16: 2.1 x float32 on Zen 4. Without either oneDNN emulates, up to 8 x slower.
    multiplies = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if multiplies else torch.float32


def gpu_dtype(name: str, capability: tuple[int, int] | None) -> torch.dtype:
    """Return the dtype on a GPU of that compute capability; None is AMD's, where ROCm has bfloat16."""
    has_bfloat16 = capability is None or capability >= BFLOAT16_CAPABILITY
    if name == "bfloat16" and not has_bfloat16:
        assert capability is not None
        rule = f"needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
        raise ConfigError("engine.dtype", name, rule, "Use engine.dtype=auto: float32 on this GPU.")
    return torch.float32 if name == "float32" or not has_bfloat16 else torch.bfloat16


class Lap:
    """The time from construction to `stop`, of all devices together. Reading ``seconds`` waits for them."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
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
        if self._devices[0].type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        first, *others = (torch.cuda.current_stream(device) for device in self._devices)
        for other in others:
            first.wait_stream(other)
        event.record(first)
        return event


class Throughput:
    """Tokens per second over the last finished passes; 0 before the first."""

    def __init__(self) -> None:
        self._passes: deque[tuple[Lap, int]] = deque(maxlen=RECENT_PASSES)
        self.total_tokens = 0  # of all passes

    def note(self, lap: Lap, num_tokens: int) -> None:
        self._passes.append((lap, num_tokens))
        self.total_tokens += num_tokens

    @property
    def tokens_per_second(self) -> float:
        over = [(lap.seconds, tokens) for lap, tokens in self._passes if lap.is_over]
        return sum(tokens for _, tokens in over) / sum(s for s, _ in over) if over else 0.0


def peak_bytes(devices: Sequence[torch.device]) -> int:
    """Return this process's peak memory: on the fullest of its GPUs, or else on the machine."""
    if devices[0].type == "cuda":
        return max(int(torch.cuda.max_memory_allocated(device)) for device in devices)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
