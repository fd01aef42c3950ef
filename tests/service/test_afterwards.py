"""The test split is looked at once per study, though every machine that ends it wants to, whatever dies."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import scipy.stats
from sqlalchemy.exc import OperationalError

from lora_search.database.storage import open_storage
from lora_search.database.write_once import Turn
from lora_search.engine.engine import Engine
from lora_search.errors import StudyError
from lora_search.files.artifacts import Artifacts
from lora_search.output.terminal import Progress
from lora_search.results.ranking import best_of
from lora_search.service.afterwards import in_turn, score_and_share
from lora_search.service.answering import read_scores, score_answers_once
from lora_search.service.reopen import reopen
from lora_search.service.samples import keep_samples_once
from lora_search.service.scoring import Finished, score_test_once
from lora_search.settings.metric_schema import MetricConfig
from lora_search.settings.recorded import recorded_config
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.study.answer_metric import read_standing
from lora_search.study.provenance import describe
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
        settings = [StudyView(config.study).settings_of(row.number) for row in self.rows]
        self.engine: Engine = reopen(config, settings, num_slots=1)

    def end(self, check: Check) -> None:
        """Do what follows the search. ``check`` is called after every pass, and while it waits."""
        score_and_share(self.config, self.rows, self.folder, self.engine, Progress(), check)

    def look(self, check: Check) -> TestScore | None:
        """Score without a turn, as one does that was silent for so long that another took the turn."""

        def after_pass() -> None:
            self.passes += 1
            check()

        return score_test_once(
            Finished(self.engine, self.config, self.folder, Progress(), after_pass), self.best
        )


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


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    """A study whose workers show every 20 ms that they live."""
    config = StudyConfig(name="s", storage=f"sqlite:///{tmp_path}/s.db", patience_seconds=0)
    optuna.create_study(study_name="s", storage=open_storage(config))
    config.heartbeat_seconds = 0.02  # type: ignore[assignment]
    return config


def until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_turn_is_extended_during_a_step_however_long_it_takes(study: StudyConfig) -> None:
    connection = open_storage(study).engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    seen: set[object] = set()

    def has_changed_twice() -> bool:
        rows = connection.exec_driver_sql("SELECT value_json FROM study_system_attributes")
        seen.update(rows.scalars())
        return len(seen) >= 3

    with in_turn(study, Progress(), lambda: None):
        until(has_changed_twice)
    connection.close()


def test_a_database_that_is_gone_for_too_long_ends_the_step(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail(_: Turn) -> None:
        failed.set()
        raise OperationalError("UPDATE", {}, Exception("gone"))

    monkeypatch.setattr(Turn, "extend", fail)
    with in_turn(study, Progress(), lambda: None) as check:
        assert failed.wait(30)

        with pytest.raises(StudyError, match="This has lasted"):
            until(lambda: check() is not None)  # type: ignore[func-returns-value]


def gone() -> None:
    raise StudyError("the database was gone for too long")


def test_what_is_raised_after_a_pass_is_no_failure_of_samples_or_scores(machines: list[Machine]) -> None:
    machine = machines[0]
    engine, config = machine.engine, machine.config
    config.study.sample_answers = 1
    config.metric = METRIC
    study = Finished(engine, config, machine.folder, Progress(), gone)

    with pytest.raises(StudyError, match="gone for too long"):
        keep_samples_once(study, machine.best)
    with pytest.raises(StudyError, match="gone for too long"):
        score_answers_once(study)


METRIC = MetricConfig(name="python", function=f"{__name__}.points", max_rows=3, max_new_tokens=6)
asked: list[str] = []


def points(_: str, answer: str, __: str) -> float:
    """A user's metric."""
    asked.append(answer)
    return -float(sum(map(ord, answer)))


def test_an_interrupt_is_answered_between_two_calls_of_the_metric(machines: list[Machine]) -> None:
    asked.clear()
    machines[0].config.metric = METRIC

    def interrupt() -> None:
        if asked:
            raise KeyboardInterrupt

    machine = machines[0]
    with pytest.raises(KeyboardInterrupt):
        score_answers_once(Finished(machine.engine, machine.config, machine.folder, Progress(), interrupt))

    assert len(asked) == 1


class Scored:
    """What a machine that has all trials finds: the winner by the metric, and who is how far behind."""

    def __init__(self, finished: Path, tmp_path: Path) -> None:
        self.machine = by_metric(finished, tmp_path / "whole")[0]
        self.machine.end(lambda: None)
        trials = sorted(self.machine.folder.glob("trials/*/answers.jsonl"))
        self.scores = {int(path.parent.name): read_scores(path.parent) for path in trials}
        means = {number: np.mean(scores) for number, scores in self.scores.items()}
        assert len(set(means.values())) == 4
        self.winner, *self.others = sorted(means, key=lambda number: -means[number])
        assert self.winner != self.machine.best.number  # by perplexity

    def behind(self, best: int, *others: int) -> dict[int, tuple[float, float]]:
        gaps = {number: np.subtract(self.scores[best], self.scores[number]) for number in others}
        return {number: (gap.mean(), scipy.stats.sem(gap)) for number, gap in gaps.items()}


def by_metric(finished: Path, folder: Path) -> list[Machine]:
    """Return two machines of a study whose metric chooses the winner."""
    folder.mkdir()
    machines = unscored(finished, folder)
    for machine in machines:
        machine.config.metric, machine.config.study.choose_by = METRIC, "metric"
    settings = json.loads(StudyView(machines[0].config.study).attributes()["settings"])
    settings["study"]["choose_by"] = "metric"
    study = optuna.load_study(study_name="smoke", storage=open_storage(machines[0].config.study))
    describe(study, {"settings": json.dumps(settings)})
    return machines


def loses(machine: Machine, *trials: int) -> None:
    """Let trials be on another disk."""
    for number in trials:
        shutil.rmtree(machine.folder / "trials" / str(number))


def behind_of(machine: Machine) -> dict[int, tuple[float, float]]:
    standing = read_standing(StudyView(machine.config.study).attributes())
    assert standing is not None
    return dict(standing.behind)


def test_each_disk_scores_its_own_trials_and_the_test_split_waits_for_all(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    known = Scored(finished, tmp_path)
    second, third, last = known.others
    for name, winner_ends_last in (("last", True), ("first", False)):
        without, winner = by_metric(finished, tmp_path / name)
        loses(without, known.winner, last)
        loses(winner, second, third)
        machines = [without, winner] if winner_ends_last else [winner, without]
        machines[0].end(lambda: None)
        assert read_test_score(StudyView(winner.config.study).attributes()) is None
        assert "the test split waits" in capsys.readouterr().out

        machines[1].end(lambda: None)
        assert behind_of(winner) == {
            number: pytest.approx(pair) for number, pair in known.behind(known.winner, last).items()
        }

        winner.end(lambda: None)
        assert (score_of(winner).trial, score_of(winner).looks) == (known.winner, 1)


def test_with_copies_the_first_machine_scores_the_trials_of_all(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = Scored(finished, tmp_path)
    machine = by_metric(finished, tmp_path / "copied")[0]
    copies = Artifacts(f"{tmp_path}/copies", "smoke")
    machine.engine.keeper = replace(machine.engine.keeper, artifacts=copies)
    for row in machine.rows:
        copies.put(row.number, machine.folder / "trials" / str(row.number), row.best_rung or 0)
        copies.settle(row.number)
    loses(machine, known.winner, known.others[0])

    machine.end(lambda: None)

    assert behind_of(machine) == {
        number: pytest.approx(pair) for number, pair in known.behind(known.winner, *known.others).items()
    }
    assert (score_of(machine).trial, score_of(machine).looks) == (known.winner, 1)
