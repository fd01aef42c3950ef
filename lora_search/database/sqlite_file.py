"""What an existing SQLite file is, before Optuna would make its tables in it. Opens it for reading only."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from optuna.storages._rdb.models import SCHEMA_VERSION

from lora_search.errors import ConfigError

KEY = "study.storage"
REMEDY = "Give a file of its own, e.g. sqlite:///runs/lora_search.db"


def check_sqlite_file(path: Path) -> None:
    """Raise ConfigError for a file that is no database, another application's, another schema's, or that may
    not be written to. A database that another process has locked is none of these."""
    if not path.is_file():
        raise ConfigError(KEY, str(path), "must be a file", REMEDY)
    if not os.access(path, os.W_OK):
        raise ConfigError(KEY, str(path), "must be a file that can be written to", REMEDY)
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {str(name) for (name,) in found}
            columns = {str(row[1]) for row in connection.execute("PRAGMA table_info(studies)")}
            version = _schema_version(connection, tables)
    except sqlite3.OperationalError:
        return  # it is locked, or has no more room: opening it says so, or waits
    except sqlite3.DatabaseError as error:
        raise ConfigError(KEY, str(path), f"must be an SQLite database ({error})", REMEDY) from None
    if tables and not {"study_id", "study_name"} <= columns:
        others = ", ".join(sorted(tables)[:5])
        raise ConfigError(KEY, str(path), f"is another application's database (tables: {others})", REMEDY)
    if version is not None and version != SCHEMA_VERSION:
        rule = (
            f"was made by another version of Optuna: its schema is {version}, this one's is {SCHEMA_VERSION}"
        )
        raise ConfigError(KEY, str(path), rule, f"Run `optuna storage upgrade`, or: {REMEDY}")


def _schema_version(connection: sqlite3.Connection, tables: set[str]) -> int | None:
    if "version_info" not in tables:
        return None
    row = connection.execute("SELECT schema_version FROM version_info").fetchone()
    return None if row is None else int(row[0])
