"""What a database holds before Optuna would make its tables in it: ours, another Optuna's, or another
application's. Reads only."""

from functools import cache
from pathlib import Path

from alembic.script import ScriptDirectory
from optuna.storages import _rdb
from optuna.storages._rdb.models import SCHEMA_VERSION, BaseModel
from sqlalchemy import inspect, text
from sqlalchemy.engine import Connection

from lora_search.errors import ConfigError

KEY = "study.storage"
ALEMBIC = "alembic_version"  # where Optuna, and other applications too, note the revision of their tables
NEWEST = {table.name: {*table.columns.keys()} for table in BaseModel.metadata.sorted_tables}


def check_tables(connection: Connection, shown: str, remedy: str, *, is_shared: bool) -> None:
    """Raise ConfigError where Optuna's tables are of another version, or their names are taken.

    ``shown``: the database in messages. ``is_shared``: other applications' tables may lie beside ours, as on
    a server.
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
    """Raise ConfigError where another version of Optuna made the tables."""
    pairs: list[tuple[object, object]] = []
    if NEWEST["version_info"] <= found.get("version_info", set()):
        pairs.append((_only_value(connection, "version_info", "schema_version"), SCHEMA_VERSION))
    if ALEMBIC in names and "version_num" in _columns(connection, ALEMBIC):
        pairs.append((_only_value(connection, ALEMBIC, "version_num"), _revisions()[0]))
    for is_, ours in pairs:
        if is_ is None or is_ == ours:
            continue
        rule = f"was made by another version of Optuna: its schema is {is_}, this one's is {ours}"
        is_older = is_ in _revisions() or (isinstance(is_, int) and is_ < SCHEMA_VERSION)
        way = "Run `optuna storage upgrade`" if is_older else "Update Optuna"
        raise ConfigError(KEY, shown, rule, f"{way}, or: {remedy}")


def _columns(connection: Connection, table: str) -> set[str]:
    return {str(column["name"]) for column in inspect(connection).get_columns(table)}


def _only_value(connection: Connection, table: str, column: str) -> object:
    """Return the value in a table of one row; None where there is no row."""
    return connection.execute(text(f"SELECT {column} FROM {table}")).scalar()  # noqa: S608 (names of our own)


@cache
def _revisions() -> list[str]:
    """Return the revisions of Optuna's tables, its newest first."""
    script = ScriptDirectory(str(Path(_rdb.__file__).parent / "alembic"))
    return [revision.revision for revision in script.walk_revisions()]
