"""MySQL by the same code: a real MariaDB, set to refuse what newer ones refuse. The many workers are in
tests/test_many_workers.py."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, inspect, text

from lora_search.database.storage import open_storage
from lora_search.errors import ConfigError
from lora_search.settings.schema import StudyConfig
from lora_search.study.study import SweepStudy
from lora_search.study.view import StudyView
from lora_search.worker.worker import work
from tests.database.test_outbox import DisturbedEngine, assert_nothing_is_missing
from tests.processes import FORKS, kill_and_restart, run_command
from tests.servers import real_mysql
from tests.study.test_study import make_config, open_study
from tests.worker.test_worker import RecordingTracker, quiet

pytestmark = [pytest.mark.slow, pytest.mark.mysql]
COMMAND = ("-cn", "smoke", "engine.device=cpu", "study.n_trials=24", "pruner=none", "engine.slots=2")


@pytest.fixture
def mysql() -> Iterator[str]:
    with real_mysql() as server:
        yield server.url


def test_a_killed_sweep_goes_on_where_it_was_and_comes_to_its_total(tmp_path: Path, mysql: str) -> None:
    command, config = [*COMMAND, f'study.storage="{mysql}"'], StudyConfig(name="smoke", storage=mysql)
    process = FORKS.Process(target=run_command, args=(tmp_path, command))
    process.start()
    wait_for_a_rung(config)
    process.kill()
    process.join(60)
    before, _ = SweepStudy.read(config)

    kill_and_restart(tmp_path, command, [])

    rows, _ = SweepStudy.read(config)
    assert process.exitcode == -signal.SIGKILL
    assert any(row.state == "RUNNING" and row.perplexities for row in before)
    assert [(row.state, [*row.perplexities]) for row in rows] == [("COMPLETE", [1, 2, 3, 4])] * 24
    assert all(row.perplexities.items() <= rows[row.number].perplexities.items() for row in before)


def wait_for_a_rung(config: StudyConfig) -> None:
    """Return when a trial that has not ended has reached a rung."""
    until, view = time.monotonic() + 120, None
    while view is None or not any(slot.rung for slot in view.slots()):
        assert time.monotonic() < until, "the sweep did not come so far"
        time.sleep(0.02)
        with contextlib.suppress(ConfigError):  # there is no study yet
            view = view or StudyView(config)


def test_training_goes_on_while_mysql_is_down_and_nothing_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with real_mysql() as server:
        study, (progress, _) = (
            open_study(make_config(tmp_path, storage=server.url, n_trials=4), tmp_path),
            quiet(),
        )
        engine = DisturbedEngine(2, server.stop, server.start)
        work(study, engine, RecordingTracker(), progress)

        assert engine.ticks_while_away >= 3
        assert "study.storage answers again" in caplog.text
        assert "hunter2" not in caplog.text
        assert_nothing_is_missing(study, 4)
        study.storage.engine.dispose()


class Killed(BaseException):
    """Ends a process as a kill does: nothing after it runs."""


@pytest.mark.parametrize("table", ["studies", "trials"])
def test_a_kill_between_a_table_and_its_index_leaves_no_study_that_can_be_made_twice(
    mysql: str, table: str
) -> None:
    def after(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.strip().startswith(f"CREATE TABLE {table} ("):
            raise Killed

    event.listen(Engine, "after_cursor_execute", after)
    try:
        with pytest.raises(Killed):
            open_storage(StudyConfig(storage=mysql))
    finally:
        event.remove(Engine, "after_cursor_execute", after)
    half, whole = indexes(mysql), None
    open_storage(StudyConfig(storage=mysql)).engine.dispose()
    whole = indexes(mysql)

    assert f"ix_{table}" not in str(half)
    assert {"ix_studies_study_name": True, "ix_trials_study_id": False}.items() <= whole.items()


def indexes(url: str) -> dict[str, bool]:
    """Return the names of all indexes, and whether they are unique."""
    engine = create_engine(url)
    tables = inspect(engine)
    found = {i["name"]: bool(i["unique"]) for t in tables.get_table_names() for i in tables.get_indexes(t)}
    engine.dispose()
    return found


def test_a_name_that_differs_only_in_case_is_refused_and_not_taken_for_the_other(
    tmp_path: Path, mysql: str
) -> None:
    config = make_config(tmp_path, storage=mysql)
    open_study(config, tmp_path)

    with pytest.raises(ConfigError, match="study.name: must be spelt like the existing study, 's', got 'S'"):
        open_study(replace(config, study=replace(config.study, name="S")), tmp_path)


def test_signs_of_any_script_come_back_as_they_were_stored_though_the_database_is_in_latin1(
    tmp_path: Path, mysql: str
) -> None:
    study = open_study(make_config(tmp_path, storage=mysql), tmp_path)
    study.study.set_user_attr("path", "data/问答 🇸🇪.jsonl")

    with study.storage.engine.connect() as connection:
        assert connection.execute(text("SELECT @@character_set_database")).scalar() == "latin1"
    assert (
        open_study(make_config(tmp_path, storage=mysql), tmp_path).attributes()["path"]
        == "data/问答 🇸🇪.jsonl"
    )
