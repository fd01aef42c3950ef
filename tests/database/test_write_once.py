"""Work that one worker of a study does at a time: who has the turn, and when it goes to another."""

import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from sqlalchemy import Connection, event

from lora_search.database.outbox import Outbox
from lora_search.database.presence import worker_is_dead, worker_name, worker_runs
from lora_search.database.storage import open_storage
from lora_search.database.write_once import Turn
from lora_search.errors import StudyError
from lora_search.settings.schema import StudyConfig

GRACE = 120.0
ELSEWHERE, ALSO_ELSEWHERE = "another:1:1", "third:1:1"  # whether these still run is not known here
GONE = worker_name(os.getpid()) + "9"  # no process of this host


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Hall:
    """A study, and its workers, each with a connection of its own."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.config, self.clock = StudyConfig(name="s", storage=f"sqlite:///{folder}/s.db"), clock
        optuna.create_study(study_name="s", storage=open_storage(self.config))

    def turn(self, worker: str) -> Turn:
        self.storage = open_storage(self.config)
        return Turn(self.storage, 1, "work", worker, GRACE, self.clock)


@pytest.fixture
def hall(tmp_path: Path, clock: Clock) -> Hall:
    return Hall(tmp_path, clock)


def test_one_has_the_turn_until_it_gives_it_back(hall: Hall) -> None:
    one, other = hall.turn(ELSEWHERE), hall.turn(ALSO_ELSEWHERE)

    assert (one.take(), other.take(), one.take()) == (True, False, True)
    one.extend()
    assert (other.take(), one.take()) == (False, True)
    one.give_back()
    assert (other.take(), one.take()) == (True, False)


def test_of_two_that_find_it_free_one_gets_it(hall: Hall) -> None:
    other = hall.turn(ALSO_ELSEWHERE)
    one = hall.turn(ELSEWHERE)
    strikes: list[bool] = []

    def strike(_: object, __: object, statement: str, *___: object) -> None:
        if statement.startswith("INSERT") and not strikes:
            strikes.append(other.take())

    event.listen(hall.storage.engine, "before_cursor_execute", strike)

    assert not one.take()
    assert strikes == [True]
    assert other.take()


def test_the_turn_of_a_process_that_has_ended_here_is_over_at_once(hall: Hall) -> None:
    assert hall.turn(GONE).take()

    assert hall.turn(ELSEWHERE).take()


def test_the_turn_of_a_process_that_runs_here_is_not_over(hall: Hall, clock: Clock) -> None:
    silent, other = hall.turn(worker_name(os.getpid())), hall.turn(ELSEWHERE)
    assert silent.take()
    assert not other.take()
    clock.now = 100 * GRACE

    assert not other.take()


def test_a_process_that_has_ended_and_that_nobody_waited_for_does_not_run() -> None:
    with subprocess.Popen("cat", stdin=subprocess.PIPE) as process:
        name = worker_name(process.pid)
        assert worker_runs(name)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        assert worker_is_dead(name)
    assert worker_is_dead(name)


def test_the_turn_of_a_silent_worker_is_over_after_the_grace_and_not_before(hall: Hall, clock: Clock) -> None:
    silent, other = hall.turn(ELSEWHERE), hall.turn(ALSO_ELSEWHERE)
    assert silent.take()
    assert not other.take()
    clock.now = GRACE
    assert not other.take()
    silent.extend()
    clock.now += 1
    assert not other.take()
    clock.now += GRACE + 1

    assert other.take()


def test_a_worker_that_lost_its_turn_cannot_extend_it_or_give_it_back(hall: Hall, clock: Clock) -> None:
    silent, other = hall.turn(ELSEWHERE), hall.turn(ALSO_ELSEWHERE)
    assert silent.take()
    assert not other.take()
    clock.now = GRACE + 1
    assert other.take()

    silent.extend()
    silent.give_back()

    assert other.take()
    assert not silent.take()


def breaks(storage: RDBStorage, is_written: bool) -> Callable[..., None]:
    """Let each commit that has written fail, before or after the database has it; return what to remove."""

    def fail(connection: Connection) -> None:
        if is_written:
            connection.connection.commit()
        raise sqlite3.OperationalError("the connection broke")

    event.listen(storage.engine, "commit", fail)
    return fail


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("failures", [1, 2])
def test_a_write_that_fails_or_whose_answer_is_lost_does_not_end_the_turn(
    hall: Hall, clock: Clock, is_written: bool, failures: int
) -> None:
    other = hall.turn(ALSO_ELSEWHERE)
    one = hall.turn(ELSEWHERE)
    assert one.take()
    fail = breaks(hall.storage, is_written)
    for _ in range(failures):
        with pytest.raises(sqlite3.OperationalError):
            one.extend()
    event.remove(hall.storage.engine, "commit", fail)
    assert not other.take()
    clock.now = GRACE

    one.extend()
    assert not other.take()
    clock.now = 2 * GRACE
    assert not other.take()

    fail = breaks(hall.storage, is_written)
    with pytest.raises(sqlite3.OperationalError):
        one.extend()
    event.remove(hall.storage.engine, "commit", fail)
    one.give_back()
    assert other.take()


def test_a_turn_that_is_lost_stays_lost_after_a_write_that_failed(hall: Hall, clock: Clock) -> None:
    other = hall.turn(ALSO_ELSEWHERE)
    one = hall.turn(ELSEWHERE)
    assert one.take()
    assert not other.take()
    fail = breaks(hall.storage, is_written=False)
    with pytest.raises(sqlite3.OperationalError):
        one.extend()
    event.remove(hall.storage.engine, "commit", fail)
    clock.now = GRACE + 1
    assert other.take()

    one.extend()
    one.give_back()

    assert other.take()
    assert not one.take()


def test_who_waits_for_a_turn_of_a_deleted_study_is_told(hall: Hall) -> None:
    one, other = hall.turn(ELSEWHERE), hall.turn(ALSO_ELSEWHERE)
    assert one.take()
    assert not other.take()
    hall.storage.delete_study(1)

    with pytest.raises(StudyError, match="study.name: 's' or some of its trials were deleted"):
        Outbox(hall.config).ask(other.take)
