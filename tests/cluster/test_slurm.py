"""launcher=slurm under a real slurmctld and slurmd: what Slurm does to a job, and what its trials become."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_search.errors import LoraSearchError
from lora_search.settings.schema import StudyConfig
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow
from tests.cluster.slurm import IS_HERE, REMEDY, cancel_jobs, real_slurm, run

ROOT = Path(__file__).parents[2]
SWEEP = [sys.executable, "-m", "lora_search.sweep", "-cn", "smoke", "engine.device=cpu", "engine.slots=1",
         "pruner=none", "sampler=random", "optim.lr=5e-3", "study.n_trials=4", "train.epochs=16",
         "study.heartbeat_seconds=1"]  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_HERE, reason=f"no Slurm here; {REMEDY}"),
    pytest.mark.skipif(not importlib.util.find_spec("submitit"), reason="no submitit: make test-cluster"),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    folder = tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True)
    with folder as name, real_slurm(Path(name)) as environment:
        yield {**os.environ, **environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(folder: Path, environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    folder.mkdir()
    return subprocess.Popen(
        [*SWEEP, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, slurm: dict[str, str]) -> list[TrialRow]:
    """The same sweep in one process."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    said, _ = start(folder, slurm).communicate(timeout=300)
    assert len(rows_of(folder)) == 4, said
    return rows_of(folder)


def rows_of(folder: Path) -> list[TrialRow]:
    try:
        return StudyView(StudyConfig(name="smoke", storage=f"sqlite:///{folder}/runs/lora_search.db")).rows()
    except LoraSearchError:
        return []  # there is no study yet


class Sweep:
    """A driver with one job, as its test watches it."""

    def __init__(self, folder: Path, slurm: dict[str, str]) -> None:
        self.folder, self.slurm = folder, slurm
        self.driver = start(folder, slurm, "launcher=slurm", "launcher.partition=low")

    def wait_for_rungs(self, more: int) -> str:
        """Wait until its trials have so many more; return the number of its job."""
        wanted = self.rungs() + more
        self.wait_until(lambda: self.rungs() >= wanted)
        return run(self.slurm, "squeue", "--noheader", "--format=%A", "--partition=low").strip()

    def wait_until_put_back(self) -> set[str]:
        """Return the reasons that trials with rungs have then."""
        self.wait_until(lambda: "RUNNING" not in [row.state for row in rows_of(self.folder)])
        return {row.reason for row in rows_of(self.folder) if row.state == "WAITING" and row.perplexities}

    def wait_until(self, is_so: Callable[[], object]) -> None:
        until = time.monotonic() + 240
        while not is_so():
            assert time.monotonic() < until, run(self.slurm, "squeue")
            time.sleep(0.2)

    def rungs(self) -> int:
        return sum(len(row.perplexities) for row in rows_of(self.folder))


@pytest.fixture
def sweep(tmp_path: Path, slurm: dict[str, str], whole: list[TrialRow]) -> Iterator[Sweep]:
    """One that leaves no driver, which would submit its jobs again, and no jobs, however its test ends."""
    found = Sweep(tmp_path / "a", slurm)
    yield found
    found.driver.kill()
    found.driver.communicate()
    cancel_jobs(slurm)


def test_cancelled_and_preempted_jobs_put_their_trials_back_and_others_end_the_sweep(
    sweep: Sweep, slurm: dict[str, str], whole: list[TrialRow]
) -> None:
    run(slurm, "scancel", sweep.wait_for_rungs(4))
    cancelled = sweep.wait_until_put_back()
    sweep.wait_for_rungs(4)
    run(slurm, "sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    preempted = sweep.wait_until_put_back()
    said, _ = sweep.driver.communicate(timeout=300)

    assert sweep.driver.returncode == 0, said
    assert said.count("its job left before the end of the study; submitted again") == 2
    assert [row.perplexities for row in rows_of(sweep.folder)] == [row.perplexities for row in whole], said
    assert cancelled == preempted == {"interrupted; its checkpoint is kept"}


def test_a_job_with_notice_of_its_time_limit_puts_its_trials_back_and_is_queued_again(
    sweep: Sweep, slurm: dict[str, str], whole: list[TrialRow]
) -> None:
    job = sweep.wait_for_rungs(4)
    run(slurm, "scancel", "--signal=USR2", job)  # as slurmctld sends it before the limit
    reasons = sweep.wait_until_put_back()
    again = sweep.wait_for_rungs(4)
    restarts = run(slurm, "scontrol", "show", "job", job)
    said, _ = sweep.driver.communicate(timeout=300)

    assert sweep.driver.returncode == 0, said
    assert again == job
    assert "Restarts=1" in restarts
    assert "submitted again" not in said
    assert [row.perplexities for row in rows_of(sweep.folder)] == [row.perplexities for row in whole], said
    assert reasons == {"interrupted; its checkpoint is kept"}
