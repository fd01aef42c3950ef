"""What a device can hold, what a pass takes, and how running out of it shows."""

import ctypes
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT_BYTES = 32 * 2**20  # the most that glibc takes


def is_out_of_memory(error: Exception) -> bool:
    """Return whether PyTorch ran out of memory: CUDA has a class for it, the CPU only words."""
    words = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def keep_freed_memory() -> None:
    """Let glibc keep what a pass frees for the next one. Fresh pages cost 5 % of a pass on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory(device: torch.device) -> None:
    """Return freed memory to the device or the operating system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def available_bytes(device: torch.device) -> int:
    """Return what can still be allocated: free GPU memory, or the machine's within its cgroup's limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    return min([machine, *_cgroup_room()])


def _cgroup_room(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the room left in this control group (v2), or nothing where there is no limit."""
    try:
        limit, used = ((root / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return []
    return [] if limit == "max" else [max(0, int(limit) - int(used))]
