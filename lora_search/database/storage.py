"""Where the study lives: any SQL database behind a SQLAlchemy URL, and who is at work on it.

SQLite gets what several processes need: write-ahead log, busy timeout, one taker for each waiting trial.
Whatever is wrong with the URL or behind it is one message, without the password.
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
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    SAWarning,
    SQLAlchemyError,
)

from lora_search.database.drivers import engine_options
from lora_search.database.presence import GRACE_HEARTBEATS, worker_name
from lora_search.database.sqlite_file import check_sqlite_file
from lora_search.database.tables import check_tables
from lora_search.errors import ConfigError, DatabaseError, StudyError
from lora_search.files.atomic import refused_writing
from lora_search.settings.schema import StudyConfig
from lora_search.settings.secrets import redact

BUSY_AT_WORK_SECONDS = 5  # SQLite waits so long for another process; then the outbox keeps what waits
MAX_ATTEMPTS = 5  # processes that create the same tables at once get in each other's way
NOT_LET_IN = (  # says a server or its driver of the URL; what else they say is no fault of the URL's
    "authentication failed", "does not exist", "no pg_hba.conf entry", "Access denied", "Unknown database",
    "invalid port", "no password supplied",
)  # fmt: skip
MADE = ("exist", "duplicate key name")  # says a database of what another process has made
NOT_THERE = (NOT_FOUND_MSG, "No trial with trial number")  # says Optuna of what is not in the database
RESTORE = (
    "Checkpoints and adapters are kept in the study's folder. Put a backup of the database back, or choose "
    "a new study.name."
)
KEY = "study.storage"
OWN_DATABASE = "Give a database of its own, e.g. after: CREATE DATABASE lora_search"
_locks_first: ContextVar[bool] = ContextVar("locks_first", default=False)
DRIVERS = (
    "Try sqlite:///runs/lora_search.db, or postgresql+psycopg://USER@HOST/DATABASE "
    "(after: pip install 'psycopg[binary]'), or mysql+pymysql://USER@HOST/DATABASE "
    "(after: pip install pymysql)"
)


def open_storage(config: StudyConfig) -> RDBStorage:
    """Return the storage, its tables made where they were missing. Raises ConfigError or StudyError."""
    quieten_optuna()
    check_storage(config)
    url = _parse(config.storage)
    if url.get_backend_name() == "sqlite":
        _make_folder(url)
    with explained_errors(config):
        if url.get_backend_name() == "sqlite":
            _make_file(config, url)
        storage = _create_tables(config, url)
        if url.get_backend_name() == "sqlite":
            _share_sqlite(storage)
        _check_spelling(config, storage)
    return storage


def check_storage(config: StudyConfig) -> None:
    """Raise ConfigError or StudyError for a database that cannot be used. Makes none."""
    url = _parse(config.storage)
    is_there, is_file = True, url.get_backend_name() == "sqlite"
    if is_file:
        _check_file(config, url)
        is_there = os.path.exists(url.database or "")  # unlike Path.exists, False where it may not look
    with explained_errors(config), _explained_url(config):
        engine = create_engine(url, **engine_options(url))
        if is_there:
            with engine.connect() as connection:
                check_tables(connection, redact(config.storage), OWN_DATABASE, is_shared=not is_file)
        engine.dispose()


@contextmanager
def _explained_url(config: StudyConfig) -> Iterator[None]:
    """Turn what a driver says of a URL that it cannot take, or a server of a user that it does not let in,
    into a ConfigError."""
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
        rule = f"must be a URL that its database takes ({cause})"
        raise ConfigError(
            KEY, redact(config.storage), rule, "Check user, password, host, database and options."
        ) from None


def _check_file(config: StudyConfig, url: URL) -> None:
    if url.database in (None, "", ":memory:"):
        rule = "must name a file, or nothing of the study is kept"
        raise ConfigError(KEY, config.storage, rule, "Try sqlite:///runs/lora_search.db")
    if "uri" in url.query:
        return
    if os.path.exists(url.database):
        check_sqlite_file(Path(url.database))
    refusal = refused_writing(Path(url.database).parent)
    if refusal is not None:
        rule = f"must lie in a folder that can be written to ({refusal})"
        raise ConfigError(KEY, config.storage, rule, "Give another folder.")


@contextmanager
def explained_errors(config: StudyConfig) -> Iterator[None]:
    """Turn what the database raises into a DatabaseError without the password, and what it has lost into a
    StudyError."""
    try:
        yield
    except KeyError as error:
        if not any(text in str(error) for text in NOT_THERE):
            raise
        what = "is not what it was: it, or trials of it, were deleted in the database while it was in use"
        raise StudyError(f"study.name: {config.name!r} {what}. {RESTORE}") from None
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError) as error:
        cause = _cause(error, make_url(config.storage))
        raise DatabaseError(f"{KEY}: {redact(config.storage)} cannot be used: {cause}") from None


@contextmanager
def locked_from_the_start() -> Iterator[None]:
    """Let each SQLite transaction inside lock the database before its first read.

    Python begins one at its first write. Optuna reads that a trial is WAITING and then makes it RUNNING: two
    processes could both take it. Other databases lock the row.
    """
    token = _locks_first.set(True)
    try:
        yield
    finally:
        _locks_first.reset(token)


def require_database(config: StudyConfig) -> None:
    """Refuse an SQLite file that is not there, so that reading a study never makes an empty one."""
    url = _parse(config.storage)
    if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).exists():
        raise ConfigError(
            KEY, redact(config.storage), "must be a database that exists", "Run the sweep first."
        )


def database_file(config: StudyConfig) -> Path | None:
    """Return the SQLite file behind study.storage; None where the database is none."""
    url = _parse(config.storage)
    is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)) if is_file else None


def quieten_optuna() -> None:
    """Leave Optuna's errors only; what its warnings say is handled here or documented."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.logging.disable_propagation()
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # Optuna records heartbeats in Study.optimize only; SweepStudy.heartbeat does it for ask and tell.
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
            KEY, redact(text), "must write special signs of the password in percent form", "@ is %40."
        )
    return url


def _make_folder(url: URL) -> None:
    if not url.database or url.database == ":memory:":
        return
    try:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{KEY}: the folder of {url.database} cannot be made: {error.strerror}") from None


def _make_file(config: StudyConfig, url: URL) -> None:
    """Let a new SQLite file appear with all its tables or not at all.

    SQLite commits each CREATE by itself. A kill between a table and its unique index left a database in which
    each start made another study of the same name.
    """
    path = Path(url.database or ":memory:")
    if url.database in (None, "", ":memory:") or "uri" in url.query or path.exists():
        return
    fresh = path.with_name(f"{path.name}.{worker_name(os.getpid()).replace('/', '-')}.new")
    _create_tables(config, url.set(database=str(fresh))).engine.dispose()
    with suppress(FileExistsError):  # another worker's came first, and is whole as well
        os.link(fresh, path)
    fresh.unlink()


def _create_tables(config: StudyConfig, url: URL) -> RDBStorage:
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            storage = RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs=engine_options(url),
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
        except RuntimeError as error:  # the tables are of another Optuna's making
            raise StudyError(f"{KEY}: {redact(config.storage)}: {str(error).splitlines()[0]}") from None
    raise AssertionError("the last attempt returns or raises")


def _create_missing_indexes(storage: RDBStorage) -> None:
    """Make what a kill between a table and its index left out: MySQL commits each CREATE by itself. Without
    the unique one each start would make another study of the same name."""
    for table in BaseModel.metadata.sorted_tables:
        for index in table.indexes:
            index.create(storage.engine, checkfirst=True)


def _check_spelling(config: StudyConfig, storage: RDBStorage) -> None:
    """Refuse a name that MySQL takes for another study's: it does not tell A from a."""
    with suppress(KeyError):  # there is no such study yet
        stored = storage.get_study_name_from_id(storage.get_study_id_from_name(config.name))
        if stored != config.name:
            rule = f"must be spelt like the study that is there, {stored!r}"
            raise ConfigError("study.name", config.name, rule, "This database takes both for one name.")


def _share_sqlite(storage: RDBStorage) -> None:
    """Let several processes and the dashboard work at once."""

    def on_connect(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA busy_timeout={1000 * BUSY_AT_WORK_SECONDS}")
        connection.execute("PRAGMA synchronous=NORMAL")

    def on_begin(connection: Connection) -> None:
        if _locks_first.get():
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    def on_new_connection(*_: object) -> None:
        if not Path(storage.engine.url.database or "").exists():
            raise sqlite3.OperationalError("the file is gone")  # or SQLite would make an empty one

    if "uri" not in storage.engine.url.query:
        event.listen(storage.engine, "do_connect", on_new_connection)
    event.listen(storage.engine, "connect", on_connect)
    event.listen(storage.engine, "begin", on_begin)
    storage.engine.dispose()  # the connections made so far know nothing of this
    storage.engine.connect().close()


def _cause(error: BaseException, url: URL) -> str:
    """Return the first line of what the database said, without the password in any spelling."""
    origin = getattr(error, "orig", None) or error.__cause__ or error
    text = redact(str(origin).strip().splitlines()[0]) if str(origin).strip() else type(origin).__name__
    return text.replace(str(url.password), "***") if url.password else text
