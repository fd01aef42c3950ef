"""A database that goes away for a while, or for good: a real SQLite file locked by another process, a real
PostgreSQL stopped and started. Training continues; every rung arrives, in order."""

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from lora_search.database.outbox import MAX_DELAY_SECONDS, Outbox
from lora_search.errors import StudyError
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.study.study import SweepStudy
from lora_search.trial import Measurement, TrialRun
from lora_search.worker.worker import work
from tests.servers import real_postgres, sqlalchemy_uri
from tests.study.test_study import RUNGS, make_config, open_study, states
from tests.worker.test_worker import CurveEngine, RecordingTracker, quiet

LOCK = (
    "import sqlite3, sys\n"
    "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
    "sys.stdin.readline()\n"
    "connection.execute('BEGIN IMMEDIATE')\n"
    "print('locked', flush=True)\n"
    "sys.stdin.readline()\n"
    "connection.execute('ROLLBACK')\n"
)


SECONDS_AWAY = 7.0  # longer than SQLite waits for a lock


class DisturbedEngine(CurveEngine):
    """At its second tick the database goes away, and comes back seconds later; counts the ticks between."""

    def __init__(
        self,
        num_slots: int,
        take_away: Callable[[], object],
        bring_back: Callable[[], object],
        seconds_away: float = SECONDS_AWAY,
    ) -> None:
        super().__init__(num_slots)
        self.seconds_away = seconds_away
        self.take_away, self.bring_back, self.is_away = take_away, bring_back, False
        self.ticks = self.ticks_while_away = 0

    def advance(self) -> list[Measurement]:
        self.ticks += 1
        if self.ticks == 2:
            self.take_away()
            self.is_away = True
            threading.Timer(self.seconds_away, self._return).start()
        self.ticks_while_away += self.is_away
        return super().advance()

    def _return(self) -> None:
        self.is_away = False
        self.bring_back()


class Database:
    """Records what is written, and refuses while told to."""

    def __init__(self) -> None:
        self.is_gone, self.written = False, []

    def write(self, what: int) -> None:
        if self.is_gone:
            raise sqlite3.OperationalError("database is locked")
        self.written.append(what)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def patient(seconds: int = 600) -> tuple[Outbox, Clock, Database]:
    clock = Clock()
    return Outbox(StudyConfig(patience_seconds=seconds), clock), clock, Database()


def test_what_waits_is_written_in_order_once_the_database_is_back() -> None:
    outbox, clock, database = patient()
    database.is_gone = True
    for what in (1, 2, 3):
        outbox.put(lambda what=what: database.write(what))
    first = outbox.flush()
    database.is_gone, clock.now = False, 0.5
    too_early = outbox.flush()
    clock.now = 1.0

    assert (first, too_early, outbox.flush()) == (False, False, True)
    assert database.written == [1, 2, 3]


def test_tries_come_later_and_later_up_to_a_limit() -> None:
    outbox, clock, database = patient()
    database.is_gone = True
    waits = []
    for _ in range(8):
        assert outbox.ask(lambda: database.write(1)) is None
        waits.append(outbox.seconds_to_next_try)
        clock.now += outbox.seconds_to_next_try

    assert waits == [1, 2, 4, 8, 16, 32, MAX_DELAY_SECONDS, MAX_DELAY_SECONDS]


def test_patience_ends_with_one_message_and_starts_anew_after_each_answer() -> None:
    outbox, clock, database = patient(seconds=5)
    for _ in range(3):
        database.is_gone = True
        assert outbox.ask(lambda: database.write(1)) is None
        clock.now += 4
        database.is_gone = False
        outbox.put(lambda: database.write(1))
        assert outbox.flush()
    database.is_gone = True
    outbox.ask(lambda: database.write(1))
    clock.now += 6

    with pytest.raises(StudyError, match=r"DATABASE. This has lasted 6 s \(study.patience_seconds: 5\)"):
        outbox.ask(lambda: database.write(1))


def assert_nothing_is_missing(study: SweepStudy, n_trials: int) -> None:
    assert study.summary().finished == n_trials
    assert states(study).keys() <= {"COMPLETE", "PRUNED"}
    for row in study.rows():
        assert list(row.perplexities) == list(range(1, len(row.perplexities) + 1))
        assert row.state == "PRUNED" or len(row.perplexities) == RUNGS


def test_training_goes_on_while_another_process_locks_sqlite_and_nothing_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study, (progress, _) = open_study(make_config(tmp_path, n_trials=4), tmp_path), quiet()
    command = [sys.executable, "-c", LOCK, str(tmp_path / "study.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as locker:

        def lock() -> None:
            print("lock", file=locker.stdin, flush=True)
            assert locker.stdout.readline() == "locked\n"

        def unlock() -> None:
            print("unlock", file=locker.stdin, flush=True)

        engine = DisturbedEngine(2, lock, unlock)
        work(study, engine, RecordingTracker(), progress)

    assert engine.ticks_while_away >= 3
    assert "database is locked. SQLite lets one process write at a time" in caplog.text
    assert "Training continues" in caplog.text
    assert "study.storage answers again" in caplog.text
    assert_nothing_is_missing(study, 4)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Any]:
    with real_postgres() as server:
        yield server


def postgres_config(server: Any, folder: Path, **changes: object) -> SweepConfig:
    uri = sqlalchemy_uri(server).replace("postgres:@", "postgres:hunter2@")
    config = make_config(folder, storage=uri, n_trials=4)
    return replace(config, study=replace(config.study, **changes))


@pytest.mark.slow
def test_training_goes_on_while_postgresql_is_down_and_nothing_is_missing(
    tmp_path: Path, postgres: Any, caplog: pytest.LogCaptureFixture
) -> None:
    study, (progress, _) = open_study(postgres_config(postgres, tmp_path), tmp_path), quiet()
    engine = DisturbedEngine(2, postgres.stop, postgres.start)

    work(study, engine, RecordingTracker(), progress)

    assert engine.ticks_while_away >= 3
    assert "Training continues" in caplog.text
    assert "study.storage answers again" in caplog.text
    assert "hunter2" not in caplog.text
    assert_nothing_is_missing(study, 4)
    study.storage.engine.dispose()


@pytest.mark.slow
def test_a_postgresql_that_stays_away_ends_the_sweep_with_one_message_and_its_trials_go_on_later(
    tmp_path: Path, postgres: Any
) -> None:
    config = postgres_config(postgres, tmp_path, name="away", patience_seconds=1)
    study, tracker, (progress, lines) = open_study(config, tmp_path), RecordingTracker(), quiet()

    with pytest.raises(
        StudyError, match=r"cannot be used: .* Checkpoints are kept: once the database"
    ) as told:
        work(study, DisturbedEngine(2, postgres.stop, lambda: None), tracker, progress)

    assert told.value.exit_code == 1
    assert "hunter2" not in str(told.value)
    assert "the next start resumes" in lines.getvalue()
    study.storage.engine.dispose()
    postgres.start()
    again = open_study(config, tmp_path)
    again.trials.put_back_unheld()  # this process still lives; a new one's name would be another
    work(again, CurveEngine(2), RecordingTracker(), progress)
    assert_nothing_is_missing(again, 4)
    again.storage.engine.dispose()


class HalfWritten(SweepStudy):
    """A study whose database goes away once, in the middle of a claim."""

    calls = 0

    def _take(self, trial: optuna.Trial) -> TrialRun:
        self.calls += 1
        if self.calls == 2:
            raise sqlite3.OperationalError("disk I/O error")
        return super()._take(trial)


def test_a_claim_that_the_database_cuts_short_leaves_no_trial_behind(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_trials=4)
    study, (progress, _) = open_study(config, tmp_path), quiet()
    study.__class__ = HalfWritten

    work(study, CurveEngine(2), RecordingTracker(), progress)

    assert_nothing_is_missing(study, 4)
    assert len(study.rows()) == 4
