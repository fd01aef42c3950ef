"""Processes that are started and killed by the dozen: forked from a server that has imported torch once."""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from lora_search import sweep

PRELOADED = (
    "sweep",
    "prepare",
    "engine.engine",
    "model.loading",
    "reading.load",
    "page.report",
    "study.study",
    "worker.worker",
)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", *(f"lora_search.{name}" for name in PRELOADED), "tests.processes"])


def run_command(folder: Path, arguments: Sequence[str]) -> None:
    """Be `python -m lora_search.sweep ARGUMENTS` in the folder; what it prints goes to log.txt there."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["lora_search.sweep", *arguments]
    code = sweep.main()
    Path("cpu_seconds.txt").write_text(str(time.process_time()))
    sys.exit(code)


def kill_at(process: BaseProcess, cpu_seconds: float) -> None:
    """Kill a process when it has used so much CPU time (on a busy machine everything takes longer alike),
    unless it has ended before; wait for its end."""
    stat, ticks = Path(f"/proc/{process.pid}/stat"), cpu_seconds * os.sysconf("SC_CLK_TCK")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) < ticks:
            time.sleep(0.002)
        process.kill()
    process.join(300)


def kill_and_restart(folder: Path, arguments: Sequence[str], moments: Iterable[float]) -> int:
    """Start the command, kill it at each moment (CPU seconds) and start it again; let the last start come to
    its end. Return the number of kills that struck."""
    for kills, moment in enumerate(moments):
        process = FORKS.Process(target=run_command, args=(folder, arguments))
        process.start()
        kill_at(process, moment)
        if process.exitcode != -signal.SIGKILL:
            return ended_well(process, folder, kills)
    process = FORKS.Process(target=run_command, args=(folder, arguments))
    process.start()
    process.join(300)
    return ended_well(process, folder, len(list(moments)))


def ended_well(process: BaseProcess, folder: Path, kills: int) -> int:
    assert process.exitcode == 0, (folder / "log.txt").read_text()[-3000:]
    return kills


def moments(seed: int, count: int, until: float) -> list[float]:
    """Return seeded random moments, each somewhere in a run of so many CPU seconds."""
    draw = random.Random(seed)
    return [draw.uniform(0.0, until) for _ in range(count)]
