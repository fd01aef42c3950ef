"""The test split is looked at once per study, though every machine that ends it wants to, whatever dies."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_search.database.storage import open_storage
from lora_search.engine.engine import Engine
from lora_search.output.terminal import Progress
from lora_search.results.ranking import best_of
from lora_search.service.afterwards import score_and_share
from lora_search.service.reopen import reopen
from lora_search.service.scoring import score_test_once
from lora_search.settings.recorded import recorded_config
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.study.stored_results import TEST_SCORE, TestScore, read_test_score
from lora_search.study.view import StudyView
from tests.processes import FORKS

Check = Callable[[], None]


class Machine:
    """One that ends the sweep: with a disk of its own, which has the trials, and an engine."""

    def __init__(self, folder: Path, config: SweepConfig) -> None:
        self.folder, self.config = folder, config
        self.rows = StudyView(config.study).rows()
        best = best_of(self.rows)
        assert best is not None
        self.best, self.passes = best, 0
        settings = StudyView(config.study).settings_of(best.number)
        self.engine: Engine = reopen(config, [settings], num_slots=1).engine

    def end(self, check: Check) -> None:
        """Do what follows the search. ``check`` is called after every pass, and while it waits."""
        score_and_share(self.config, self.rows, self.folder, self.engine, Progress(), check)

    def look(self, check: Check) -> TestScore | None:
        """Score without a turn, as one does that was silent for so long that another took the turn."""

        def after_pass() -> None:
            self.passes += 1
            check()

        return score_test_once(self.engine, self.config.study, self.folder, self.best, after_pass)


def unscored(finished: Path, tmp_path: Path) -> list[Machine]:
    """Return two machines that share the database of a study nobody has scored."""
    for name in "ab":
        shutil.copytree(
            finished / "runs/smoke", tmp_path / name / "smoke", ignore=shutil.ignore_patterns("test_rows.npz")
        )
    for file in (finished / "runs").glob("lora_search.db*"):
        shutil.copy(file, tmp_path)
    study = StudyConfig(name="smoke", storage=f"sqlite:///{tmp_path}/lora_search.db")
    attributes = StudyView(study).attributes()
    forget(study)
    config = recorded_config(attributes, study)
    config.study.sample_answers = 0
    return [Machine(tmp_path / name / "smoke", config) for name in "ab"]


def forget(study: StudyConfig) -> None:
    storage = open_storage(study)
    with storage.engine.begin() as connection:
        done = connection.exec_driver_sql(f"DELETE FROM study_user_attributes WHERE key = '{TEST_SCORE}'")
    assert done.rowcount == 1


def score_of(machine: Machine) -> TestScore:
    found = read_test_score(StudyView(machine.config.study).attributes())
    assert found is not None
    return found


@pytest.fixture
def machines(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    monkeypatch.chdir(tmp_path)
    return unscored(finished, tmp_path)


def test_two_machines_that_end_together_look_once(machines: list[Machine]) -> None:
    one, other = machines
    waits, begun = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: other.end(waits.set))

    def in_a_pass() -> None:
        if not begun.is_set():
            begun.set()
            thread.start()
            assert waits.wait(60)  # the other asks for its turn while this one scores

    one.end(in_a_pass)
    thread.join(60)

    assert score_of(one).looks == 1
    assert [len(list(machine.folder.glob("trials/*/test_rows.npz"))) for machine in machines] == [1, 0]


def test_a_machine_that_dies_as_it_scores_is_followed_by_another(machines: list[Machine]) -> None:
    one, other = machines
    process = FORKS.Process(target=die_in_a_pass, args=(one.folder, one.config))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL

    other.end(lambda: None)

    assert score_of(other).looks == 1
    assert score_of(other).trial == other.best.number


def die_in_a_pass(folder: Path, config: SweepConfig) -> None:
    Machine(folder, config).end(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_look_that_comes_too_late_changes_nothing(machines: list[Machine]) -> None:
    late, other = machines

    def strike() -> None:
        if late.passes == 1:
            assert other.look(lambda: None) is not None

    assert late.look(strike) is None
    assert score_of(other).looks == 1
    assert other.passes >= 1
