"""Worker processes that share one study and have one parent: here (local) or on a cluster (ray, slurm).

The parent imports no torch and trains nothing: it shows the study, restarts workers that a signal killed, and
forwards an interrupt. A worker is the same command with `launcher.worker=N`; it trains like launcher=inline.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_search.errors import InputError
from lora_search.ops.cores import num_cores
from lora_search.output.terminal import Progress
from lora_search.settings.rules import require, require_devices
from lora_search.settings.schema import SweepConfig
from lora_search.worker.command import Command
from lora_search.worker.live_overview import Overview
from lora_search.worker.on_ray import RayTeam
from lora_search.worker.on_slurm import SlurmTeam
from lora_search.worker.seat import make_order
from lora_search.worker.team import Team, Worker, check_workers, error_file

LOGS = "workers"  # the folder of their logs, in the study's
LOOK_SECONDS = 1.0  # between two polls of the workers and the study


def visible_gpus() -> int:
    """Return the number of GPUs that torch sees, from a separate process, so that this one stays small."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def plan_workers(config: SweepConfig, num_gpus: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Return each worker's environment: its own GPUs, or its share of the cores.

    ``num_gpus`` is 0 with engine.device=cpu. Raises ConfigError if there are too few GPUs.
    """
    workers, size = config.launcher.workers, config.engine.devices_per_worker
    require_devices(size, num_gpus, "the visible GPUs")
    most = num_gpus // size
    count = workers or most or 1
    check_workers(config, count)
    rule = f"must be at most {most}, the visible GPUs" + (f" by {size}" if size > 1 else "")
    remedy = "Lower it" + (", or set engine.device=cpu" if size == 1 else "")
    require(num_gpus == 0 or count <= most, "launcher.workers", workers, rule, remedy)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(num_gpus)]
    threads = str(max(1, num_cores() // count))
    common = {"OMP_NUM_THREADS": threads, **environment}
    if num_gpus == 0:
        return [common] * count
    groups = [",".join(gpus[i * size : (i + 1) * size]) for i in range(count)]
    return [common | {"CUDA_VISIBLE_DEVICES": group} for group in groups]


def run_workers(config: SweepConfig, command: Command, progress: Progress, check: Callable[[], None]) -> None:
    """Start the workers and supervise them until the study is finished. Raises the error that ended them all,
    or the one of ``check``, which is called at intervals."""
    folder = Path(config.runs_dir) / config.study.name
    team = make_team(config, command, folder / LOGS)
    overview = Overview(config.study, progress, folder, tells_ends=not team.shows_logs)
    with team, progress:
        progress.event(f"workers: {team.places}; they write to {folder / LOGS}")
        while team.is_at_work:
            progress.events(team.look())
            overview.show()
            check()
            time.sleep(LOOK_SECONDS)
    team.check_someone_finished()


def make_team(config: SweepConfig, command: Command, logs: Path) -> Team | RayTeam | SlurmTeam:
    """Return the workers of the launcher that the settings name, not yet started. Raises InputError."""
    if config.launcher.name == "local":
        num_gpus = 0 if config.engine.device == "cpu" else visible_gpus()
        return local_team(config, command, plan_workers(config, num_gpus, os.environ), num_gpus, logs)
    check_workers(config, config.launcher.workers or 1)
    order = make_order(command, config.launcher.max_restarts, os.environ)
    if config.launcher.name == "ray":
        return RayTeam(config, order, logs)
    assert config.launcher.name == "slurm"
    return SlurmTeam(config, order, logs)


def local_team(
    config: SweepConfig,
    command: Command,
    environments: Sequence[Mapping[str, str]],
    num_gpus: int,
    logs: Path,
) -> Team:
    """Return one worker for each environment."""
    restarts = config.launcher.max_restarts
    workers = [
        Worker(command.for_worker(number), environment, log, restarts, command.letter(error_file(log)))
        for number, environment in enumerate(environments)
        if (log := (logs / f"{number}.log").absolute())
    ]
    size = config.engine.devices_per_worker
    each = "on the CPU" if not num_gpus else "on one GPU each" if size == 1 else f"on {size} GPUs each"
    return Team(workers, f"{len(workers)} {each}")


@contextmanager
def leaving_no_folder(folder: Path) -> Iterator[None]:
    """Where the input is refused, remove the study's folder if it is new and holds the workers' logs only."""
    made = [path for path in (folder, folder.parent) if not path.exists()]
    try:
        yield
    except InputError:
        with suppress(OSError):
            if folder in made and set(os.listdir(folder)) <= {LOGS}:
                shutil.rmtree(folder / LOGS, ignore_errors=True)
                for path in made:
                    path.rmdir()
        raise
