"""The name of a worker process, and whether that process still runs."""

import os
import platform
from pathlib import Path

GRACE_HEARTBEATS = 4  # missed by a dead worker (optuna#5470: with fewer, live workers lose their trials)


def worker_name(pid: int) -> str:
    """Return host:pid:start, unlike any other process's even after the pid is used again."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        fields = stat.read_text().rpartition(")")[2].split()
        started = "0" if fields[0] == "Z" else fields[19]  # Z: ended, and its parent has not waited for it
    except OSError:  # no such process, or no /proc
        started = "0"
    return f"{_host()}:{pid}:{started}"


def worker_runs(name: str) -> bool | None:
    """Return whether the worker's process still runs; None if it is not of this host, or that is unknown."""
    host, _, rest = name.partition(":")
    pid = rest.partition(":")[0]
    known_here = host == _host() and pid.isdigit() and Path("/proc/self/stat").exists()
    return worker_name(int(pid)) == name if known_here else None


def worker_is_dead(name: str) -> bool:
    """Return whether the worker ran on this host and has ended; False if that is unknown."""
    return worker_runs(name) is False


def _host() -> str:
    """Return the host's name; containers with the same name differ in their PID namespace."""
    namespace = Path("/proc/self/ns/pid")
    return f"{platform.node()}/{os.stat(namespace).st_ino}" if namespace.exists() else platform.node()
