"""`python -m tests.benchmarks.launchers [WORKERS ...]`: wall time of a study by one, two, ... Ray workers.

The launcher, its seats, the worker's loop and PostgreSQL are real; the engine waits (`simulated`). Time runs
from the first trial's begin, when all workers are there, to the last one's end.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from lora_search.settings.schema import EngineConfig, LauncherConfig
from lora_search.study.view import StudyView
from lora_search.worker.on_ray import RayTeam
from lora_search.worker.seat import make_order
from tests.benchmarks.simulated import NAME, SimulatedCommand, sweep
from tests.servers import postgres_url

TRIALS, RUNG_SECONDS = 48, 1.0


def measure(workers: int, storage: str, folder: Path) -> tuple[float, float]:
    """Return the seconds that the trials took, and the launcher with them."""
    config = sweep(storage, TRIALS)
    config.launcher = LauncherConfig(name="ray", workers=workers)
    config.engine = EngineConfig(device="cpu")
    command = SimulatedCommand(
        sweep=NAME, config_dir=None, overrides=(storage, str(TRIALS), str(RUNG_SECONDS), str(workers))
    )
    begin = time.monotonic()
    team = RayTeam(config, make_order(command, 0, os.environ), folder)
    with team:
        while team.is_at_work:
            team.look()
            time.sleep(0.2)
    team.check_someone_finished()
    whole = time.monotonic() - begin
    rows = StudyView(config.study).rows()
    assert len(rows) == TRIALS
    return max(r.ended or 0 for r in rows) - min(r.began or float("inf") for r in rows), whole


def main() -> None:
    sys.stdout.write("| workers | seconds | against one | with Ray's start |\n|---|---|---|---|\n")
    first = 0.0
    for workers in [int(word) for word in sys.argv[1:]] or [1, 2]:
        with postgres_url() as url, tempfile.TemporaryDirectory() as folder:
            seconds, whole = measure(workers, url, Path(folder))
        first = first or seconds
        sys.stdout.write(f"| {workers} | {seconds:.1f} | {first / seconds:.2f}x | {whole:.1f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
