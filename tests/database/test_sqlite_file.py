"""A file that is no database of ours is refused before anything is written to it."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from lora_search.database.storage import check_storage, open_storage
from lora_search.errors import ConfigError
from lora_search.settings.schema import StudyConfig


def make(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def text(path: Path) -> None:
    path.write_text("hello\n" * 100)


def contacts(path: Path) -> None:
    make(path, "CREATE TABLE contacts (name TEXT)")


def other_studies(path: Path) -> None:
    make(path, "CREATE TABLE studies (x INT)", "CREATE TABLE contacts (name TEXT)")


def newer(path: Path) -> None:
    open_storage(StudyConfig(storage=f"sqlite:///{path}")).engine.dispose()
    make(path, "UPDATE version_info SET schema_version = 99")


def older(path: Path) -> None:
    open_storage(StudyConfig(storage=f"sqlite:///{path}")).engine.dispose()
    make(path, "UPDATE alembic_version SET version_num = 'v2.6.0.a'")


def version_of_another(path: Path) -> None:
    make(path, "CREATE TABLE version_info (version TEXT)")


WRONG: list[tuple[Callable[[Path], None], str]] = [
    (text, r"must be an SQLite database \(file is not a database\)"),
    (contacts, r"is another application's database \(tables: contacts\)"),
    (other_studies, r"is another application's database \(tables: studies\)"),
    (newer, "was made by another version of Optuna: its schema is 99, this one's is 12"),
    (older, "was made by another version of Optuna: its schema is v2.6.0.a, .* Run `optuna storage upgrade`"),
    (version_of_another, r"is another application's database \(tables: version_info\)"),
    (Path.mkdir, "must be a file"),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("write", "message"), WRONG)
def test_a_file_that_is_no_database_of_ours_is_refused_and_stays_as_it_was(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "study.db"
    write(path)
    before = path.read_bytes() if path.is_file() else b""
    config = StudyConfig(storage=f"sqlite:///{path}")

    for ask in (check_storage, open_storage):
        with pytest.raises(ConfigError, match=f"study.storage: {message}") as refused:
            ask(config)
        assert refused.value.exit_code == 2

    assert (path.read_bytes() if path.is_file() else b"") == before


def test_an_empty_file_and_one_of_ours_are_taken(tmp_path: Path) -> None:
    (tmp_path / "study.db").touch()

    for _ in range(2):
        open_storage(StudyConfig(storage=f"sqlite:///{tmp_path}/study.db")).engine.dispose()


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///x.db?timeout=soon", "must be a URL that the database accepts .could not convert string"),
        ("sqlite:///x.db?nosuch=1", "Query string argument.* 'nosuch' are not accepted"),
        ("sqlite+aiosqlite:///x.db", "needs a database driver"),
        ("sqlite:///file/below/x.db", "must be in a writable folder .*file: Not a directory"),
    ],
)
def test_a_url_that_sqlite_does_not_take_is_refused_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()

    with pytest.raises(ConfigError, match=f"study.storage: .*{message}"):
        check_storage(StudyConfig(storage=url))

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
