"""launcher=ray and launcher=slurm for real: a Ray cluster on this machine, submitit's local executor."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lora_search.errors import LoraSearchError
from lora_search.settings.schema import StudyConfig
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow

ROOT = Path(__file__).parents[2]
SWEEP = ["-cn", "smoke", "engine.device=cpu", "engine.slots=2", "pruner=none", "optim.lr=5e-3",
         "study.n_trials=4", "train.epochs=4", "study.heartbeat_seconds=1"]  # fmt: skip
LAUNCHERS = [
    pytest.param("ray", ["launcher=ray", "launcher.workers=2"], id="ray"),
    pytest.param("submitit", ["launcher=slurm", "launcher.cluster=local", "launcher.workers=2"], id="slurm"),
]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "lora_search.sweep", *SWEEP, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},  # it decides the last bits
    )


def rows_of(folder: Path) -> list[TrialRow]:
    return StudyView(StudyConfig(name="smoke", storage=f"sqlite:///{folder}/runs/lora_search.db")).rows()


def wait_for_rung(folder: Path, rung: int) -> None:
    until = time.monotonic() + 240
    while time.monotonic() < until:
        try:
            if any(len(row.perplexities) >= rung for row in rows_of(folder)):
                return
        except LoraSearchError:
            pass  # there is no study yet
        time.sleep(0.1)
    raise AssertionError("no trial has come that far")


def workers_in(folder: Path) -> list[psutil.Process]:
    """Return the workers of one sweep, oldest first."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "create_time"]):
        line = process.info["cmdline"] or []
        if process.info["cwd"] == str(folder) and any("launcher.worker=" in word for word in line):
            found.append(process)
    return sorted(found, key=lambda process: process.info["create_time"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[TrialRow]:
    """The same sweep in one process."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    said, _ = start(folder).communicate(timeout=300)
    assert "Leaderboard" in said
    return rows_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "launcher"), LAUNCHERS)
def test_a_killed_worker_is_replaced_and_the_values_are_those_of_one_process(
    library: str, launcher: list[str], tmp_path: Path, whole: list[TrialRow]
) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: make test-cluster")
    folder = tmp_path / "a"
    process = start(folder, *launcher)
    wait_for_rung(folder, 1)
    workers_in(folder)[0].kill()
    said, _ = process.communicate(timeout=400)

    assert process.returncode == 0, said
    assert "was killed by SIGKILL; restarted" in said
    assert [row.state for row in rows_of(folder)] == ["COMPLETE"] * 4
    assert [row.perplexities for row in rows_of(folder)] == [row.perplexities for row in whole]
    assert "worker 1 | " in (folder / "runs/smoke/sweep.log").read_text()
    assert not workers_in(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "launcher"), LAUNCHERS)
def test_an_interrupted_driver_has_all_trials_put_back(
    library: str, launcher: list[str], tmp_path: Path
) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: make test-cluster")
    folder = tmp_path / "a"
    process = start(folder, *launcher, "train.epochs=30")
    wait_for_rung(folder, 1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)

    assert process.returncode == 130, said
    assert "nothing is lost" in said
    assert {row.state for row in rows_of(folder)} & {"RUNNING", "FAIL"} == set()
    assert not workers_in(folder)
