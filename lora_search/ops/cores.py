"""The cores that this process may use, and whether others use them. No torch."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

OWN, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
CROWDED = 2.0  # programs that want to compute, per core of the machine
THREADS = "OMP_NUM_THREADS"


def num_cores() -> int:
    """Return for how many cores this process has leave: of those it may run on, what the quota of its control
    groups allows. A container with two CPUs on a host of 64 sees all 64; torch starts a thread for each."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([seen, *quotas(OWN, ROOT)])))


def notes_on_cores() -> list[str]:
    """Return a warning where torch takes a thread for each core and others compute on them: threads wait for
    the slowest of them at each operation."""
    cores, busy = os.cpu_count() or 1, os.getloadavg()[0]
    if THREADS in os.environ or busy < CROWDED * cores:
        return []
    return [
        f"this machine is busy: {busy:.0f} programs compete for its {cores} cores. Threads that wait for "
        f"each other make a sweep many times slower; {THREADS}=1 before the command avoids that"
    ]


def quotas(own: Path, root: Path) -> Iterator[float]:
    """Yield the cores' worth of time that each control group of this process allows (v1 and v2)."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (parts for line in lines if len(parts := line.split(":", 2)) == 3):
        if not path.startswith("/") or (controllers and "cpu" not in controllers.split(",")):
            continue
        base = root / controllers
        for group in [PurePosixPath(path), *PurePosixPath(path).parents]:  # in a container only / exists
            folder = base / group.relative_to("/")
            yield from _quota(
                folder, ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if controllers else ["cpu.max"]
            )


def _quota(folder: Path, names: list[str]) -> Iterator[float]:
    try:
        quota, period = " ".join((folder / name).read_text() for name in names).split()
    except (OSError, ValueError):
        return
    if quota.isdigit() and int(quota) > 0:
        yield int(quota) / int(period)
