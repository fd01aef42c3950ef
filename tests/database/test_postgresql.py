"""A study in a real PostgreSQL, at small size; the storms with many workers are in tests/worker."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, inspect, text

from lora_search.database.storage import check_storage, open_storage
from lora_search.errors import ConfigError
from lora_search.settings.schema import StudyConfig
from lora_search.study.identity import find_identity
from tests.servers import postgres_url
from tests.study.test_study import make_config, open_study, simulate, states


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with postgres_url() as url:
        yield url


@pytest.fixture
def url(server_url: str) -> Iterator[str]:
    """The URL of a schema of its own."""
    yield f"{server_url}&options=-csearch_path%3Down"
    run(server_url, "DROP SCHEMA IF EXISTS own CASCADE")


def run(url: str, *statements: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def tables(url: str) -> list[str]:
    engine = create_engine(url)
    found = inspect(engine).get_table_names()
    engine.dispose()
    return sorted(found)


def test_a_study_in_postgresql_comes_to_its_total_and_the_next_start_finds_it_done(
    tmp_path: Path, server_url: str
) -> None:
    config = make_config(tmp_path, storage=server_url, n_trials=5)
    study, connections = open_study(config, tmp_path), list[object]()
    event.listen(study.storage.engine, "connect", lambda connection, _: connections.append(connection))
    simulate(study, slots=2)

    again = open_study(config, tmp_path)

    assert connections == []  # it works with the one that it was opened with

    assert again.is_finished
    assert again.claim(1) == []
    assert sum(states(again).values()) == again.summary().finished == 5
    for opened in (study, again):
        opened.storage.engine.dispose()


def test_looking_for_a_study_makes_no_table(server_url: str, url: str) -> None:
    run(server_url, "CREATE SCHEMA own", "CREATE TABLE own.customers (name TEXT)")

    assert find_identity(StudyConfig(storage=url)) is None
    assert tables(url) == ["customers"]


OLDER = "UPDATE alembic_version SET version_num = 'v2.6.0.a'"
NEWER = "UPDATE alembic_version SET version_num = 'v9.9.9.a'"
FOREIGN = [
    (["CREATE TABLE own.studies (x INT)"], r"is another application's database \(tables: studies\)"),
    (["CREATE TABLE own.trials (dose INT)"], r"is another application's database \(tables: trials\)"),
    (["CREATE TABLE own.version_info (x INT)"], r"is another application's .*\(tables: version_info\)"),
    (["CREATE TABLE own.alembic_version (version_num TEXT)",
      "INSERT INTO own.alembic_version VALUES ('3f2a')"], r"is another application's .*alembic_version\)"),
]  # fmt: skip
VERSIONS = [
    (OLDER, r"its schema is v2.6.0.a, this one's is v\S+, got .* Run `optuna storage upgrade`, or: Give a"),
    (NEWER, r"its schema is v9.9.9.a, .* Update Optuna, or: Give a database of its own"),
    ("UPDATE version_info SET schema_version = 99", "its schema is 99, this one's is 12.* Update Optuna"),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("statements", "message"), FOREIGN)
def test_tables_of_another_application_are_refused_before_ours_are_made(
    server_url: str, url: str, statements: list[str], message: str
) -> None:
    run(server_url, "CREATE SCHEMA own", *statements)
    before = tables(url)

    for ask in (check_storage, open_storage):
        with pytest.raises(ConfigError, match=f"study.storage: {message}") as refused:
            ask(StudyConfig(storage=url))
        assert "hunter2" not in str(refused.value)

    assert tables(url) == before


@pytest.mark.wrong_input
@pytest.mark.parametrize(("statement", "message"), VERSIONS)
def test_the_tables_of_another_optuna_are_refused_with_the_way_out(
    server_url: str, url: str, statement: str, message: str
) -> None:
    run(server_url, "CREATE SCHEMA own")
    open_storage(StudyConfig(storage=url)).engine.dispose()
    check_storage(StudyConfig(storage=url))
    run(url, statement)

    with pytest.raises(ConfigError, match=message):
        check_storage(StudyConfig(storage=url))


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("/postgres?", "/nowhere?"),
            'must be a URL that the database accepts .*database "nowhere" does not',
        ),
        (("postgres:hunter2@", "nobody:hunter2@"), 'role "nobody" does not exist'),
        (("?host", "?connect_timeout=soon&host"), "connect_timeout"),
        (("?host", "?nosuch=1&host"), 'invalid connection option "nosuch"'),
    ],
)
def test_a_url_that_its_server_does_not_take_is_wrong_input(
    server_url: str, change: tuple[str, str], message: str
) -> None:
    wrong = server_url.replace(*change)

    with pytest.raises(ConfigError, match=message) as refused:
        check_storage(StudyConfig(storage=wrong))

    assert wrong != server_url
    assert "hunter2" not in str(refused.value)
