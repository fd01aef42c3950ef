"""The smoke sweep, killed again and again at random moments, each time started again by the same command.

Every kill is a real SIGKILL of a real process that trains a real (tiny) model.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_search.settings.schema import StudyConfig
from lora_search.study.study import SweepStudy
from lora_search.trial import TrialRow
from tests.processes import kill_and_restart, moments

ROOT = Path(__file__).parents[2]
COMMAND = ("-cn", "smoke", "engine.device=cpu", "study.n_trials=24", "study.heartbeat_seconds=1",
           "study.max_retries=1000", "optim.lr=5e-3")  # fmt: skip
UNPRUNED, PRUNED = ("sampler=random", "pruner=none"), ("sampler=tpe", "pruner=asha")
TRACKED, TRIALS = "tracker=wandb_offline", "runs/smoke/trials/*"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def rows_of(folder: Path) -> list[TrialRow]:
    rows, _ = SweepStudy.read(StudyConfig(name="smoke", storage=f"sqlite:///{folder}/runs/lora_search.db"))
    return rows


def undisturbed(folder: Path, *own: str) -> tuple[list[TrialRow], float]:
    """Return the trials of a run that nobody kills, and the CPU seconds that it takes."""
    kill_and_restart(folder, [*COMMAND, *own], [])
    return rows_of(folder), float((folder / "cpu_seconds.txt").read_text())


def killed(folder: Path, kills: int, seconds: float, *own: str) -> list[Path]:
    """Run whole sweeps, two at a time, until so many kills have struck; return their folders.

    They strike in the first third of what a whole run takes: about half of them before training begins.
    """

    def lane(number: int) -> list[Path]:
        folders: list[Path] = []
        struck = 0
        while struck < kills / 2:
            folders.append(folder / f"lane-{number}" / str(len(folders)))
            planned = moments(seed=100 * number + len(folders), count=kills // 2 - struck, until=seconds / 3)
            struck += kill_and_restart(folders[-1], [*COMMAND, *own], planned)
        return folders

    with ThreadPoolExecutor(2) as pool:
        return [done for folders in pool.map(lane, range(2)) for done in folders]


def told(rows: Sequence[TrialRow], value: Callable[[float], object]) -> list[object]:
    """Return what the study tells of its trials."""
    return [
        (r.number, r.state, r.params, {k: value(v) for k, v in r.perplexities.items()}, r.best_rung)
        for r in rows
    ]


def test_one_slot_measures_bitwise_the_same_through_fifty_kills(tmp_path: Path) -> None:
    whole, seconds = undisturbed(tmp_path / "whole", *UNPRUNED, "engine.slots=1")

    sweeps = killed(tmp_path, 50, seconds, *UNPRUNED, "engine.slots=1")

    assert [row.state for row in whole] == ["COMPLETE"] * 24
    assert [told(rows_of(done), float.hex) for done in sweeps] == [told(whole, float.hex)] * len(sweeps)


def test_four_slots_measure_the_same_through_sixty_kills_whoever_shares_the_pass(tmp_path: Path) -> None:
    whole, seconds = undisturbed(tmp_path / "whole", *UNPRUNED, "engine.slots=4")

    sweeps = killed(tmp_path, 60, seconds, *UNPRUNED, "engine.slots=4")

    about = lambda value: pytest.approx(value, rel=1e-6)  # noqa: E731 (other neighbours, other rounding)
    assert [row.state for row in whole] == ["COMPLETE"] * 24
    assert [told(rows_of(done), float) for done in sweeps] == [told(whole, about)] * len(sweeps)


def test_pruned_and_tracked_sweeps_come_to_their_total_through_kills(tmp_path: Path) -> None:
    whole, seconds = undisturbed(tmp_path / "whole", *PRUNED, "engine.slots=4", TRACKED)
    known = {(row.number, str(row.params)): row.perplexities for row in whole}

    sweeps = killed(tmp_path, 20, seconds, *PRUNED, "engine.slots=4", TRACKED)

    for rows in map(rows_of, sweeps):
        assert len(rows) == len({str(row.params) for row in rows}) == 24
        assert {row.state for row in rows} <= {"COMPLETE", "PRUNED"}
        assert all([*row.perplexities] == [*range(1, len(row.perplexities) + 1)] for row in rows)
        same = [(row.perplexities, known.get((row.number, str(row.params)), {})) for row in rows]
        common = [(mine[k], other[k]) for mine, other in same for k in mine.keys() & other.keys()]
        assert len(common) >= 5
        assert all(a == pytest.approx(b, rel=1e-6) for a, b in common)
    parts = [sorted(trial.glob("wandb/offline-run-*")) for done in sweeps for trial in done.glob(TRIALS)]
    assert all(parts)
    assert max(map(len, parts)) > 1  # a trial that was taken up again has a second part, with the same id
    assert all(len({part.name.partition("-smoke-")[2] for part in two}) == 1 for two in parts)
    names = [(part.name, part.parents[1].name) for two in parts for part in two]
    assert all(re.search(rf"-smoke-[0-9a-f]{{12}}-{number}$", name) for name, number in names)


def test_fresh_processes_killed_while_they_train_leave_what_the_same_command_finishes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "lora_search.sweep", *COMMAND, *UNPRUNED, "engine.slots=4"]
    for sign in ("reading", "trials done", "tokens/s"):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
        ) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if sign in line)
            process.kill()
        assert process.returncode == -signal.SIGKILL

    subprocess.run(command, stdout=subprocess.DEVNULL, cwd=tmp_path, env=environment, check=True)

    rows = rows_of(tmp_path)
    assert [(row.state, sorted(row.perplexities)) for row in rows] == [("COMPLETE", [1, 2, 3, 4])] * 24
