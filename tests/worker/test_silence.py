"""A database server that accepts connections and never answers, for real: all its processes are stopped. And
an answer that is lost: the write was done, and who asked for it does not know."""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from lora_search.database.drivers import SILENCE_SECONDS
from lora_search.errors import DatabaseError, StudyError
from lora_search.search.trials import FINISHED
from lora_search.settings.schema import SweepConfig
from lora_search.study.study import SweepStudy
from lora_search.worker.worker import work
from tests.database.test_outbox import DisturbedEngine, assert_nothing_is_missing
from tests.servers import frozen, real_mysql, real_postgres, sqlalchemy_uri
from tests.study.test_study import make_config, open_study
from tests.worker.test_many_workers import started, trials_of
from tests.worker.test_worker import CurveEngine, RecordingTracker, quiet

SECONDS_SILENT = 2.5 * SILENCE_SECONDS
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def postgres() -> Iterator[Any]:
    with real_postgres() as server:
        yield server


def config_of(folder: Path, storage: str, **changes: object) -> SweepConfig:
    config = make_config(folder, storage=storage, n_trials=4)
    return replace(config, study=replace(config.study, heartbeat_seconds=1, **changes))


def switch(server: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return what silences the server and what lets it speak again."""
    stack = ExitStack()
    return lambda: stack.enter_context(frozen(server)), stack.close


@slow
def test_training_goes_on_while_postgresql_is_silent_and_nothing_is_missing(
    tmp_path: Path, postgres: Any, caplog: pytest.LogCaptureFixture
) -> None:
    study, (progress, _) = (
        open_study(config_of(tmp_path, sqlalchemy_uri(postgres), name="away"), tmp_path),
        quiet(),
    )
    engine = DisturbedEngine(2, *switch(postgres), SECONDS_SILENT)

    work(study, engine, RecordingTracker(), progress)

    assert engine.ticks_while_away >= 3
    assert "timeout expired. Training continues" in caplog.text
    assert "study.storage answers again" in caplog.text
    assert_nothing_is_missing(study, 4)
    study.storage.engine.dispose()


@slow
@pytest.mark.mysql
def test_training_goes_on_while_mysql_is_silent_and_nothing_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with real_mysql() as server:
        study, (progress, _) = open_study(config_of(tmp_path, server.url), tmp_path), quiet()
        engine = DisturbedEngine(2, server.freeze, server.thaw, SECONDS_SILENT)
        work(study, engine, RecordingTracker(), progress)

        assert engine.ticks_while_away >= 3
        assert "timed out" in caplog.text
        assert "study.storage answers again" in caplog.text
        assert_nothing_is_missing(study, 4)
        study.storage.engine.dispose()


@slow
def test_a_postgresql_that_stays_silent_ends_the_sweep_with_one_message_and_its_trials_go_on_later(
    tmp_path: Path, postgres: Any
) -> None:
    config = config_of(tmp_path, sqlalchemy_uri(postgres), name="silent", patience_seconds=5)
    study, (progress, lines) = open_study(config, tmp_path), quiet()
    silence, wake = switch(postgres)
    try:
        with pytest.raises(StudyError, match=r"cannot be used: .* Checkpoints are kept: once the database"):
            work(study, DisturbedEngine(2, silence, lambda: None), RecordingTracker(), progress)
    finally:
        wake()

    assert "the next start resumes" in lines.getvalue()
    again = open_study(config, tmp_path)
    again.trials.put_back_unheld()  # this process still lives; a new one's name would be another
    work(again, CurveEngine(2), RecordingTracker(), progress)
    assert_nothing_is_missing(again, 4)
    for opened in (study, again):
        opened.storage.engine.dispose()


@slow
def test_a_postgresql_that_is_silent_from_the_start_is_one_message_after_seconds(
    tmp_path: Path, postgres: Any
) -> None:
    config, begin = config_of(tmp_path, sqlalchemy_uri(postgres), name="start"), time.monotonic()

    with frozen(postgres), pytest.raises(DatabaseError, match=r"cannot be used: .*timeout expired"):
        open_study(config, tmp_path)

    assert time.monotonic() - begin < 2 * SILENCE_SECONDS


@slow
def test_postgresql_is_asked_for_signs_of_life_unless_the_url_says_otherwise(
    tmp_path: Path, postgres: Any
) -> None:
    storage = f"{sqlalchemy_uri(postgres)}&keepalives_idle=7"
    study = open_study(config_of(tmp_path, storage, name="signs"), tmp_path)

    with study.storage.engine.connect() as connection:
        told = connection.connection.dbapi_connection.info.get_parameters()
    assert (told["keepalives_idle"], told["tcp_user_timeout"], told["connect_timeout"]) == (
        "7",
        "10000",
        "10",
    )
    study.storage.engine.dispose()


@slow
def test_workers_lose_and_double_nothing_when_postgresql_falls_silent_again_and_again(
    tmp_path: Path, postgres: Any
) -> None:
    n_trials, storage = 200, sqlalchemy_uri(postgres)

    with started(3, tmp_path, storage, n_trials) as workers:
        time.sleep(5)  # imports; then the silence begins wherever they are
        for _ in range(3):
            time.sleep(2.5)
            with frozen(postgres):
                time.sleep(1.2 * SILENCE_SECONDS)
        for worker in workers:
            worker.join(300)

    assert [worker.exitcode for worker in workers] == [0] * 3
    finished = [t for t in trials_of(storage) if t.state in FINISHED]
    assert len(finished) == len({str(t.params) for t in finished}) == n_trials
    assert all(sorted(t.intermediate_values) == [*range(1, len(t.intermediate_values) + 1)] for t in finished)


class Lossy(sqlite3.Connection):
    """Commits, and says at every so many commits that it could not."""

    period, commits, lost = 0, 0, 0

    def commit(self) -> None:
        wrote = self.in_transaction
        super().commit()
        Lossy.commits += wrote
        if wrote and Lossy.commits % Lossy.period == 0:
            Lossy.lost += 1
            raise sqlite3.OperationalError("the answer is lost")


def lose_answers(study: SweepStudy, period: int) -> None:
    Lossy.period, Lossy.commits, Lossy.lost = period, 0, 0

    def connect(_dialect: object, _record: object, arguments: Any, options: Any) -> sqlite3.Connection:
        return sqlite3.connect(*arguments, **options, factory=Lossy)

    event.listen(study.storage.engine, "do_connect", connect)
    study.storage.engine.dispose()


@slow
@pytest.mark.parametrize("period", [7, 9, 11])  # of about 35 commits
def test_a_write_whose_answer_was_lost_is_not_done_twice_nor_is_a_claim(
    tmp_path: Path, period: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    config = config_of(tmp_path, f"sqlite:///{tmp_path}/study.db", max_retries=1000)
    study, until = open_study(config, tmp_path), time.monotonic() + 120
    lose_answers(study, period)

    def check() -> None:
        assert time.monotonic() < until, study.rows()

    work(study, CurveEngine(2), RecordingTracker(), quiet()[0], check)

    assert Lossy.lost >= 3
    study.storage.engine.dispose()
    Lossy.period = 10**9
    assert_nothing_is_missing(study, 4)
    assert len(study.rows()) == 4
