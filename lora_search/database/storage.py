"""The study's storage: any SQL database behind a SQLAlchemy URL.

SQLite is set up for several processes: write-ahead log, busy timeout, and a lock so that one process takes
each waiting trial. Any problem with the URL or the database is one message, without the password.
"""

import os
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import NOT_FOUND_MSG, BaseModel
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    SAWarning,
    SQLAlchemyError,
)

from lora_search.database.drivers import engine_options
from lora_search.database.presence import GRACE_HEARTBEATS, worker_name
from lora_search.database.sqlite_file import check_sqlite_file
from lora_search.database.tables import check_tables, create_tables
from lora_search.database.trial_reader import BY_STATE
from lora_search.database.trial_storage import TrialStorage
from lora_search.errors import ConfigError, DatabaseError, StudyError
from lora_search.files.atomic import refused_writing
from lora_search.settings.schema import StudyConfig
from lora_search.settings.secrets import redact

BUSY_AT_WORK_SECONDS = 5  # how long SQLite waits for another process; then the outbox keeps the write
MAX_ATTEMPTS = 5  # to create tables, since processes that do so at once make each other fail
NOT_LET_IN = (  # in the message of a server or driver if the URL is wrong
    "authentication failed", "does not exist", "no pg_hba.conf entry", "Access denied", "Unknown database",
    "invalid port", "no password supplied",
)  # fmt: skip
MADE = ("exist", "duplicate key name")  # in a database's message if another process has created a table
NOT_THERE = (NOT_FOUND_MSG, "No trial with trial number")  # in Optuna's message for a deleted row
RESTORE = (
    "Checkpoints and adapters are kept in the study's folder. Put a backup of the database back, or choose "
    "a new study.name."
)
TOO_MANY = (
    "SQLite lets one process write at a time: start fewer workers, or give "
    "study.storage=postgresql+psycopg://USER@HOST/DATABASE"
)
KEY = "study.storage"
OWN_DATABASE = "Give a database of its own, e.g. after: CREATE DATABASE lora_search"
_locks_first: ContextVar[int] = ContextVar("locks_first", default=0)  # for how long SQLite waits for its lock
DRIVERS = (
    "Try sqlite:///runs/lora_search.db, or postgresql+psycopg://USER@HOST/DATABASE "
    "(after: pip install 'psycopg[binary]'), or mysql+pymysql://USER@HOST/DATABASE "
    "(after: pip install pymysql)"
)


def open_storage(config: StudyConfig) -> RDBStorage:
    """Return the storage; create missing tables. Raises ConfigError or StudyError."""
    quieten_optuna()
    check_storage(config)
    url = _parse(config.storage)
    _make_folder(url)
    with explained_errors(config):
        _make_file(url)
        storage = _open(config, url)
        if url.get_backend_name() == "sqlite":
            _share_sqlite(storage)
        _check_spelling(config, storage)
    return storage


def check_storage(config: StudyConfig) -> None:
    """Raise ConfigError or StudyError for a database that cannot be used. Creates nothing."""
    url = _parse(config.storage)
    is_there, is_file = True, url.get_backend_name() == "sqlite"
    if is_file:
        _check_file(config, url)
        is_there = os.path.exists(url.database or "")  # unlike Path.exists, False without permission to look
    with explained_errors(config), _explained_url(config):
        engine = create_engine(url, **engine_options(url))
        if is_there:
            with engine.connect() as connection:
                check_tables(connection, redact(config.storage), OWN_DATABASE, is_shared=not is_file)
        engine.dispose()


@contextmanager
def _explained_url(config: StudyConfig) -> Iterator[None]:
    """Turn a driver's error about the URL, or a server's refusal of the user, into a ConfigError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Query string argument")  # of SQLite: they would be ignored
            yield
    except ImportError:
        raise ConfigError(KEY, redact(config.storage), "needs a database driver", DRIVERS) from None
    except (ValueError, TypeError, ArgumentError, ProgrammingError, OperationalError, SAWarning) as error:
        cause = _cause(error, make_url(config.storage))
        if isinstance(error, OperationalError) and not any(words in cause for words in NOT_LET_IN):
            raise
        rule = f"must be a URL that the database accepts ({cause})"
        raise ConfigError(
            KEY, redact(config.storage), rule, "Check user, password, host, database and options."
        ) from None


def _check_file(config: StudyConfig, url: URL) -> None:
    file = file_of(url)
    if file is None:
        rule = "must name a file, so that the study is kept"
        raise ConfigError(KEY, config.storage, rule, "Try sqlite:///runs/lora_search.db")
    if "uri" in url.query:
        return
    if os.path.exists(file):
        check_sqlite_file(file)
    refusal = refused_writing(file.parent)
    if refusal is not None:
        rule = f"must be in a writable folder ({refusal})"
        raise ConfigError(KEY, config.storage, rule, "Give another folder.")


@contextmanager
def explained_errors(config: StudyConfig) -> Iterator[None]:
    """Turn the database's exceptions into a DatabaseError without the password; a deleted study or trial
    into a StudyError."""
    try:
        yield
    except KeyError as error:
        if not any(text in str(error) for text in NOT_THERE):
            raise
        what = "or some of its trials were deleted in the database while it was in use"
        raise StudyError(f"study.name: {config.name!r} {what}. {RESTORE}") from None
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError) as error:
        cause = _cause(error, make_url(config.storage))
        more = f". {TOO_MANY}" if cause == "database is locked" else ""
        raise DatabaseError(f"{KEY}: {redact(config.storage)} cannot be used: {cause}{more}") from None


@contextmanager
def locked_from_the_start(seconds: int = BUSY_AT_WORK_SECONDS) -> Iterator[None]:
    """Inside, every SQLite transaction locks the database before its first read, and waits up to so many
    seconds for other processes.

    By default Python begins a transaction at the first write. Optuna reads that a trial is WAITING and then
    sets it to RUNNING, so two processes could both take it. Other databases lock the row.
    """
    token = _locks_first.set(max(seconds, _locks_first.get()))
    try:
        yield
    finally:
        _locks_first.reset(token)


def require_database(config: StudyConfig) -> None:
    """Raise ConfigError if the SQLite file does not exist, so that reading a study never creates one."""
    file = database_file(config)
    if file is not None and not file.exists():
        raise ConfigError(
            KEY, redact(config.storage), "must be a database that exists", "Run the sweep first."
        )


def database_file(config: StudyConfig) -> Path | None:
    """Return the SQLite file of study.storage; None for another database."""
    return file_of(_parse(config.storage))


def file_of(url: URL) -> Path | None:
    """Return the SQLite file that a URL names; None for another database, or one in memory."""
    is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)) if is_file else None


def quieten_optuna() -> None:
    """Show only Optuna's errors; its warnings are handled here or documented."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.logging.disable_propagation()
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # Optuna records heartbeats only in Study.optimize; SweepStudy.heartbeat does so for ask and tell.
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")


def _parse(text: str) -> URL:
    try:
        url = make_url(text)
        url.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise ConfigError(KEY, redact(text), "must be a SQL URL of a known kind", DRIVERS) from None
    except ImportError as error:
        raise ConfigError(KEY, redact(text), f"needs a database driver ({error})", DRIVERS) from None
    if "@" in (url.host or ""):
        raise ConfigError(
            KEY, redact(text), "must percent-encode special characters of the password", "@ is %40."
        )
    return url


def _make_folder(url: URL) -> None:
    file = file_of(url)
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{KEY}: the folder of {file} cannot be created: {error.strerror}") from None


def _make_file(url: URL) -> None:
    """Create a new SQLite file, if that is the database, with all its tables in one step.

    SQLite commits each CREATE by itself. After a kill between a table and its unique index, every start would
    create another study of the same name.
    """
    path = file_of(url)
    if path is None or "uri" in url.query or path.exists():
        return
    fresh = path.with_name(f"{path.name}.{worker_name(os.getpid()).replace('/', '-')}.new")
    engine = create_engine(url.set(database=str(fresh)))
    create_tables(engine)
    engine.dispose()
    with suppress(FileExistsError):  # another worker was first, with a complete file
        os.link(fresh, path)
    fresh.unlink()


def _open(config: StudyConfig, url: URL) -> RDBStorage:
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            storage = TrialStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs=engine_options(url),
                skip_compatibility_check=True,  # `check_tables` has done it
                heartbeat_interval=config.heartbeat_seconds,
                grace_period=GRACE_HEARTBEATS * config.heartbeat_seconds,
            )
            _create_missing_indexes(storage)
            return storage
        except SQLAlchemyError as error:
            is_race = isinstance(error, IntegrityError) or any(word in str(error).lower() for word in MADE)
            if attempt == MAX_ATTEMPTS or not is_race:
                raise
            time.sleep(0.1 * attempt)
        except ImportError as error:
            raise ConfigError(KEY, redact(config.storage), "needs a database driver", DRIVERS) from error

    raise AssertionError("the last attempt returns or raises")


def _create_missing_indexes(storage: RDBStorage) -> None:
    """Create the indexes that a kill between a table and its index left out: MySQL commits each CREATE by
    itself. Without the unique one every start would create another study of the same name."""
    for table in BaseModel.metadata.sorted_tables:
        for index in table.indexes - {BY_STATE}:
            index.create(storage.engine, checkfirst=True)
    with suppress(ProgrammingError, OperationalError, InternalError):  # another user's tables, or read-only
        BY_STATE.create(storage.engine, checkfirst=True)


def _check_spelling(config: StudyConfig, storage: RDBStorage) -> None:
    """Raise ConfigError for a name that MySQL, which ignores case, confuses with another study's."""
    with suppress(KeyError):  # no such study yet
        stored = storage.get_study_name_from_id(storage.get_study_id_from_name(config.name))
        if stored != config.name:
            rule = f"must be spelt like the existing study, {stored!r}"
            raise ConfigError("study.name", config.name, rule, "This database ignores upper and lower case.")


def _share_sqlite(storage: RDBStorage) -> None:
    """Set SQLite up for several processes and the dashboard at once."""

    def on_connect(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA busy_timeout={1000 * BUSY_AT_WORK_SECONDS}")
        connection.execute("PRAGMA synchronous=NORMAL")

    def on_begin(connection: Connection) -> None:
        seconds = _locks_first.get()
        wait = seconds or BUSY_AT_WORK_SECONDS
        if connection.info.get("waits") != wait:
            connection.exec_driver_sql(f"PRAGMA busy_timeout={1000 * wait}")
            connection.info["waits"] = wait
        if seconds and not connection.get_execution_options().get("only_reads"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    def on_new_connection(*_: object) -> None:
        if not Path(storage.engine.url.database or "").exists():
            raise sqlite3.OperationalError("the file is gone")  # SQLite would create an empty one

    if "uri" not in storage.engine.url.query:
        event.listen(storage.engine, "do_connect", on_new_connection)
    event.listen(storage.engine, "connect", on_connect)
    event.listen(storage.engine, "begin", on_begin)
    storage.engine.dispose()  # open connections lack these settings
    storage.engine.connect().close()


def _cause(error: BaseException, url: URL) -> str:
    """Return the first line of the database's message, without the password in any spelling."""
    origin = getattr(error, "orig", None) or error.__cause__ or error
    text = redact(str(origin).strip().splitlines()[0]) if str(origin).strip() else type(origin).__name__
    return text.replace(str(url.password), "***") if url.password else text
