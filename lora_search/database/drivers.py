"""How the study's database is connected to, driver by driver, and how long it may be silent.

A server that hangs, or whose host is gone, accepts what is sent and never answers. Each wait for it ends
after SILENCE_SECONDS with the driver's OperationalError, and the connection is closed: with psycopg, pymysql
and mysqlclient. psycopg2 has no such limit. What was asked may have been done all the same. Costs nothing
while the server answers.
"""

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from sqlalchemy.engine import URL

T = TypeVar("T")
SILENCE_SECONDS = 10  # training stands still meanwhile; then the outbox keeps what waits
SQLITE_SECONDS = 60  # how long SQLite waits for another process's write while it is opened
CONNECT = {"connect_timeout": SILENCE_SECONDS}
LIBPQ = CONNECT | {
    "keepalives_idle": 30,  # nor does a firewall forget a connection between two heartbeats
    "keepalives_interval": SILENCE_SECONDS,
    "keepalives_count": 3,
    "tcp_user_timeout": 1000 * SILENCE_SECONDS,
}
MYSQL = CONNECT | {"read_timeout": SILENCE_SECONDS, "write_timeout": SILENCE_SECONDS}
LIMITS = {
    "psycopg": LIBPQ,
    "psycopg2": LIBPQ,
    "pymysql": MYSQL,
    "mysqldb": MYSQL,
}


def engine_options(url: URL) -> dict[str, object]:
    """Return what SQLAlchemy's create_engine is given beside the URL. What the URL says itself is kept."""
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": SQLITE_SECONDS}}
    options: dict[str, object] = {"creator": Line(url), "pool_pre_ping": True}
    if url.get_backend_name() in ("mysql", "mariadb"):
        # Their default, REPEATABLE READ, refuses to write a row that has changed since the transaction began
        # (MariaDB from 11.6 on: error 1020). PostgreSQL's default is this one.
        options["isolation_level"] = "READ COMMITTED"
    return options


class Line:
    """Connects to a server; after a failure it rests as long as that took: Optuna tries five times."""

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
            raise self._last_failure.with_traceback(None)  # or it would grow, and hold its callers' frames
        try:
            return self._connect(*self._arguments, **self._options)
        except self._failures as error:
            now = time.monotonic()
            self._last_failure, self._rests_until = error, now + (now - begin)
            raise


def impatient(psycopg: Any) -> Any:
    """Return psycopg's Connection with an end to its waits, for which neither it nor libpq has an option."""

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
    """Hand on what psycopg waits for; it is asked every 0.1 s. TimeoutError after too long a silence."""
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
            raise TimeoutError(f"the server has said nothing for {SILENCE_SECONDS} s")
