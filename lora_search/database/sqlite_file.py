"""Checks an existing SQLite file before Optuna creates its tables in it. Opens the file read-only."""

import os
import sqlite3
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import NullPool

from lora_search.database.tables import KEY, check_tables
from lora_search.errors import ConfigError

MOST_WORKERS = 8  # without training between their writes 8 got through, of 32 many failed
TO_A_SERVER = (
    "Give study.storage=postgresql+psycopg://user@host/database (pip install 'lora-search[postgres]')"
)
REMEDY = "Give a file of its own, e.g. sqlite:///runs/lora_search.db"


def check_sqlite_file(path: Path) -> None:
    """Raise ConfigError for a file that is not a database, belongs to another application, has another schema
    version, or is read-only. A database that another process has locked passes."""
    if not path.is_file():
        raise ConfigError(KEY, str(path), "must be a file", REMEDY)
    if not os.access(path, os.W_OK):
        raise ConfigError(KEY, str(path), "must be a file that can be written to", REMEDY)
    uri = f"{path.resolve().as_uri()}?mode=ro"
    engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(uri, uri=True), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            check_tables(connection, str(path), REMEDY, is_shared=False)
    except OperationalError:
        return  # it is locked, or the disk is full: opening it waits or reports that
    except DatabaseError as error:
        raise ConfigError(KEY, str(path), f"must be an SQLite database ({error.orig})", REMEDY) from None
