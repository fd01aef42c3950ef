"""Connections to the study's database, with time limits for each driver.

A server that hangs, or whose host is gone, accepts queries and never answers. With psycopg, pymysql and
mysqlclient each wait ends after SILENCE_SECONDS with the driver's OperationalError, and the connection is
closed; psycopg2 has no such limit. The server may have run the query all the same. Costs nothing while the
server answers.
"""

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from sqlalchemy.engine import URL

T = TypeVar("T")
SILENCE_SECONDS = 10  # training pauses for so long; then the outbox keeps the writes
SQLITE_SECONDS = 60  # how long SQLite waits for another process's write while the study is opened
CONNECT = {"connect_timeout": SILENCE_SECONDS}
LIBPQ = CONNECT | {
    "keepalives_idle": 30,  # also keeps firewalls from dropping the connection between two heartbeats
    "keepalives_interval": SILENCE_SECONDS,
    "keepalives_count": 3,
    "tcp_user_timeout": 1000 * SILENCE_SECONDS,
}
MYSQL = CONNECT | {"read_timeout": SILENCE_SECONDS, "write_timeout": SILENCE_SECONDS}
POOL = {"pool_size": 1, "max_overflow": 1}  # a worker keeps one connection open, and never needs a third
LIMITS = {
    "psycopg": LIBPQ,
    "psycopg2": LIBPQ,
    "pymysql": MYSQL,
    "mysqldb": MYSQL,
}


def engine_options(url: URL) -> dict[str, object]:
    """Return the options of SQLAlchemy's create_engine. Options in the URL take precedence."""
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": SQLITE_SECONDS}}
    options: dict[str, object] = {"creator": Line(url), "pool_pre_ping": True, **POOL}
    if url.get_backend_name() in ("mysql", "mariadb"):
        # With their default, REPEATABLE READ, MariaDB from 11.6 on refuses to write a row that has changed
        # since the transaction began (error 1020). PostgreSQL's default is READ COMMITTED.
        options["isolation_level"] = "READ COMMITTED"
    return options


class Line:
    """Connects to a server. A failure repeats without a new try for as long as it took: Optuna tries five
    times."""

    def __init__(self, url: URL) -> None:
        kind: Any = url.get_dialect()
        driver = kind.import_dbapi()
        self._arguments, given = kind(dbapi=driver).create_connect_args(url)
        self._options = {**LIMITS.get(kind.driver, {}), **given}
        self._connect: Callable[..., object] = driver.connect
        if kind.driver == "psycopg":
            self._connect = impatient(driver).connect
        self._failures: type[Exception] = driver.Error
        self._last_failure: Exception = driver.Error()
        self._rests_until = 0.0

    def __call__(self) -> object:
        begin = time.monotonic()
        if begin < self._rests_until:
            raise self._last_failure.with_traceback(None)  # a growing traceback would keep frames alive
        try:
            return self._connect(*self._arguments, **self._options)
        except self._failures as error:
            now = time.monotonic()
            self._last_failure, self._rests_until = error, now + (now - begin)
            raise


def impatient(psycopg: Any) -> Any:
    """Return psycopg's Connection with a time limit on each wait: neither psycopg nor libpq has an option."""

    class Impatient(psycopg.Connection):  # type: ignore[misc]
        def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
            try:
                answer: T = super().wait(_while_it_speaks(gen), *args, **kwargs)
            except TimeoutError as error:
                self.close()
                raise psycopg.OperationalError(str(error)) from None
            return answer

    return Impatient


def _while_it_speaks(gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
    """Forward the generator that psycopg polls every 0.1 s. Raises TimeoutError after SILENCE_SECONDS."""
    ready, last_word = None, time.monotonic()
    while True:
        try:
            waits_for = gen.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result
        ready = yield waits_for
        now = time.monotonic()
        if ready:
            last_word = now
        elif now - last_word > SILENCE_SECONDS:
            raise TimeoutError(f"no answer from the server for {SILENCE_SECONDS} s")
