"""One process at a time in a folder; the operating system unlocks it when the process dies. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lora_search.errors import StudyError
from lora_search.files.atomic import explained_writing

LOCK = ".lock"


@contextmanager
def alone(folder: Path, what: str = "") -> Iterator[None]:
    """Keep other processes from doing the same in the folder. Wait for one that does, or, where ``what`` says
    what is done there, raise StudyError."""
    with explained_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0 if what else -1)
    except Timeout:
        remedy = "Wait for it, or end it: it keeps what it has trained."
        raise StudyError(f"{what}: another process does the same in {folder}. {remedy}") from None
    try:
        yield
    finally:
        lock.release()
