"""How the study's database is connected to, driver by driver. Costs nothing while the server answers."""

from sqlalchemy.engine import URL

CONNECT_SECONDS = 10  # a server that does not answer is taken for gone
SQLITE_SECONDS = 60  # how long SQLite waits for another process's write while it is opened


def engine_options(url: URL) -> dict[str, object]:
    """Return what SQLAlchemy's create_engine is given beside the URL."""
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": SQLITE_SECONDS}}
    options: dict[str, object] = {
        "connect_args": {"connect_timeout": CONNECT_SECONDS},
        "pool_pre_ping": True,
    }
    if url.get_backend_name() in ("mysql", "mariadb"):
        # Their default, REPEATABLE READ, refuses to write a row that has changed since the transaction began
        # (MariaDB from 11.6 on: error 1020). PostgreSQL's default is this one.
        options["isolation_level"] = "READ COMMITTED"
    return options
