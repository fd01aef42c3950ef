"""Optuna's tables: checks whose tables a database has, ours, another Optuna's or another application's, and
creates ours in a new file."""

from functools import cache
from pathlib import Path

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from optuna.storages import _rdb
from optuna.storages._rdb.models import SCHEMA_VERSION, BaseModel
from sqlalchemy import inspect, text
from sqlalchemy.engine import Connection, Engine

from lora_search.errors import ConfigError

KEY = "study.storage"
ALEMBIC = "alembic_version"  # the table in which Optuna, and other applications, record their revision
NEWEST = {table.name: {*table.columns.keys()} for table in BaseModel.metadata.sorted_tables}


def check_tables(connection: Connection, shown: str, remedy: str, *, is_shared: bool) -> None:
    """Raise ConfigError if Optuna's tables are of another version, or their names are taken.

    ``shown``: the database in messages. ``is_shared``: other applications may have tables in it too, as on a
    server.
    """
    names = inspect(connection).get_table_names()
    found = {name: _columns(connection, name) for name in names if name in NEWEST}
    if "studies" in found and {"study_id", "study_name"} <= found["studies"]:
        _check_version(connection, {*names}, found, shown, remedy)
    taken = sorted(name for name, columns in found.items() if not NEWEST[name] <= columns)
    if ALEMBIC in names and "studies" not in names:
        taken.append(ALEMBIC)
    if not is_shared and not found:
        taken = names
    if taken:
        others = ", ".join(taken[:5])
        raise ConfigError(KEY, shown, f"is another application's database (tables: {others})", remedy)


def _check_version(
    connection: Connection, names: set[str], found: dict[str, set[str]], shown: str, remedy: str
) -> None:
    """Raise ConfigError if another version of Optuna created the tables."""
    pairs: list[tuple[object, object]] = []
    if NEWEST["version_info"] <= found.get("version_info", set()):
        pairs.append((_only_value(connection, "version_info", "schema_version"), SCHEMA_VERSION))
    if ALEMBIC in names and "version_num" in _columns(connection, ALEMBIC):
        pairs.append((_only_value(connection, ALEMBIC, "version_num"), _revisions().get_current_head()))
    for is_, ours in pairs:
        if is_ is None or is_ == ours:
            continue
        rule = f"was made by another version of Optuna: its schema is {is_}, this one's is {ours}"
        known = {revision.revision for revision in _revisions().walk_revisions()}
        is_older = is_ in known or (isinstance(is_, int) and is_ < SCHEMA_VERSION)
        way = "Run `optuna storage upgrade`" if is_older else "Update Optuna"
        raise ConfigError(KEY, shown, rule, f"{way}, or: {remedy}")


def _columns(connection: Connection, table: str) -> set[str]:
    return {str(column["name"]) for column in inspect(connection).get_columns(table)}


def _only_value(connection: Connection, table: str, column: str) -> object:
    """Return the value in a table of one row; None if there is no row."""
    return connection.execute(text(f"SELECT {column} FROM {table}")).scalar()  # noqa: S608 (names of our own)


def create_tables(engine: Engine) -> None:
    """Create the tables and indexes in an empty database, marked as of the newest revision."""
    with engine.begin() as connection:
        BaseModel.metadata.create_all(connection)
        MigrationContext.configure(connection).stamp(_revisions(), "head")


@cache
def _revisions() -> ScriptDirectory:
    """Return the revisions of Optuna's tables. Loading them takes 45 ms, and Optuna does so at each use."""
    return ScriptDirectory(str(Path(_rdb.__file__).parent / "alembic"))
