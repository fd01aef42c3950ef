"""What happens to a whole process: it hangs and wakes up; its disk is full. All for real."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from lora_search.errors import WriteError
from lora_search.files.atomic import write_file
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.study.study import SweepStudy
from lora_search.trial import Measurement
from lora_search.worker.worker import work
from tests.study.test_study import SPAWN, make_config, open_study, states
from tests.worker.test_worker import CurveEngine, RecordingTracker, quiet

ROOT = Path(__file__).parents[2]
SMOKE = ["-cn", "smoke", "engine.device=cpu", "pruner=none", "optim.lr=5e-3"]


def start(
    folder: Path, *arguments: str, python: Sequence[str] = (), **options: object
) -> subprocess.Popen[str]:
    """Start the command as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, *python, "-m", "lora_search.sweep", *SMOKE, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment, **options,
    )  # fmt: skip


def read_until(lines: Iterable[str] | None, text: str) -> str:
    """Return the first line with the text in it; a process that ends without one fails the test."""
    return next(line for line in lines or () if text in line)


# --- a worker that hangs


class SlowEngine(CurveEngine):
    """Leaves a file when it trains, and reaches no rung until it was stopped and woken."""

    def advance(self) -> list[Measurement]:
        Path("trains").touch()
        time.sleep(0.05)
        return super().advance() if Path("woken").exists() else []


def hang_in_the_middle(folder: Path) -> None:
    os.chdir(folder)
    progress, lines = quiet()
    work(open_study(heartbeats(folder), folder), SlowEngine(2), RecordingTracker(), progress)
    Path("said").write_text(lines.getvalue())


def heartbeats(folder: Path) -> SweepConfig:
    config = make_config(folder, n_trials=4)
    return replace(config, study=replace(config.study, heartbeat_seconds=1))


def wait_for(path: Path, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_hung_workers_trials_are_taken_over_and_when_it_wakes_it_lets_them_go(tmp_path: Path) -> None:
    hung = SPAWN.Process(target=hang_in_the_middle, args=(tmp_path,))
    hung.start()
    wait_for(tmp_path / "trains")
    os.kill(hung.pid or 0, signal.SIGSTOP)
    try:
        study, (progress, _) = open_study(heartbeats(tmp_path), tmp_path), quiet()
        work(study, CurveEngine(2), RecordingTracker(), progress)
        finished = study.rows()
        (tmp_path / "woken").touch()
    finally:
        os.kill(hung.pid or 0, signal.SIGCONT)
    hung.join(60)

    said = (tmp_path / "said").read_text()
    assert hung.exitcode == 0
    assert "trial 0 dropped: taken over by another worker while this one was silent" in said
    assert "trial 1 dropped: taken over by another worker while this one was silent" in said
    assert states(study).keys() <= {"COMPLETE", "PRUNED"}
    assert study.summary().finished == 4
    assert study.rows() == finished
    assert {t.user_attrs["worker"] for t in study.study.get_trials()} == {study.worker}


# --- a disk that is full


def test_a_full_disk_is_one_message_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_file(path, b"good")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            WriteError, match=r"state.* cannot be written: File too large. .* make room"
        ) as told:
            write_file(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert told.value.exit_code == 1
    assert path.read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["state"]


BIG = ["lora.target_modules=all-linear", "space.lora.r=choice(192,256)", "study.n_trials=2", "train.epochs=1"]


@pytest.mark.slow
def test_a_sweep_whose_disk_is_full_ends_with_one_message_and_the_same_command_finishes_it(
    tmp_path: Path,
) -> None:
    limit = 4_500_000  # bytes of one file: less than a checkpoint, more than the database and its log
    full = start(tmp_path, *BIG, preexec_fn=limited(limit))
    out, err = full.communicate(timeout=300)
    rows, _ = SweepStudy.read(StudyConfig(name="smoke", storage=f"sqlite:///{tmp_path}/runs/lora_search.db"))
    unfinished = [path for path in (tmp_path / "runs").rglob("*") if path.name.endswith(".tmp")]
    again = start(tmp_path, *BIG)
    again_out, _ = again.communicate(timeout=300)

    assert full.returncode == 1, out + err
    assert "cannot be written: File too large. Existing files are unchanged: make room" in " ".join(
        out.split()
    )
    assert "Traceback" not in out + err
    assert [row.state for row in rows] == ["WAITING", "WAITING"]
    assert unfinished == []
    assert again.returncode == 0, again_out
    assert "2 of 2" not in out


def limited(limit: int) -> Callable[[], None]:
    """Return what lets a process write no file of more bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.slow
def test_a_report_that_cannot_be_written_is_one_message_and_is_written_later(tmp_path: Path) -> None:
    report = tmp_path / "runs/smoke/report.html"
    command = [sys.executable, "-m", "lora_search.report", "-cn", "smoke"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = partial(subprocess.run, command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    refused = start(tmp_path, "study.n_trials=3")
    read_until(refused.stdout, "base model on cpu")
    (report / "in the way").mkdir(parents=True)
    out, err = refused.communicate(timeout=300)
    again = run()
    shutil.rmtree(report)
    later = run()

    rows, _ = SweepStudy.read(StudyConfig(name="smoke", storage=f"sqlite:///{tmp_path}/runs/lora_search.db"))
    assert [row.state for row in rows] == ["COMPLETE"] * 3
    assert (refused.returncode, again.returncode, later.returncode) == (1, 1, 0)
    assert "Leaderboard" in out
    for told in (out, again.stdout):
        text = " ".join(told.split())
        assert text.count("report.html cannot be written: Is a directory. Existing files are unchanged") == 1
    assert "Traceback" not in out + err + again.stdout + again.stderr
    assert sorted(path.name for path in report.parent.iterdir() if path.name.startswith("report")) == [
        "report.html"
    ]


@pytest.mark.slow
def test_a_best_adapter_that_cannot_be_written_is_one_message_and_the_same_command_writes_it(
    tmp_path: Path,
) -> None:
    in_the_way = tmp_path / "runs/smoke/best.new"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    first = start(tmp_path, "study.n_trials=3")
    out, err = first.communicate(timeout=300)
    in_the_way.unlink()
    again = start(tmp_path, "study.n_trials=3")
    again_out, again_err = again.communicate(timeout=300)

    assert (first.returncode, again.returncode) == (1, 0), again_out + again_err
    assert "Leaderboard" in out
    assert "cannot be written: Not a directory" in " ".join(out.split())
    assert "Traceback" not in out + err
    assert (tmp_path / "runs/smoke/best/adapter/adapter_config.json").exists()
    assert not in_the_way.exists()
