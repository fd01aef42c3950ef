"""Atomic file writes: to a temporary file next to the target, synced to disk, then renamed.

Any error of the disk (full, over quota, read-only) is one message, and leaves the older file unchanged.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_search.errors import WriteError

TEMPORARY = ".tmp"  # ends the name of a file that is not finished


def write_file(path: Path, content: bytes) -> None:
    """Write the content atomically, replacing an older file. Raises WriteError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end it is synced and atomically replaces an older file.
    Raises WriteError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    with explained_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            permissions = temporary.stat().st_mode
            yield temporary
            temporary.chmod(permissions)  # safetensors makes its files private to the user
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's entries, to disk, so that they survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refused_writing(folder: Path) -> str | None:
    """Return why no file can be made in a folder, or the folder not be made; None if it can. Leaves
    nothing."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place}: {error.strerror}"


@contextmanager
def explained_writing(path: Path) -> Iterator[None]:
    """Turn an OSError while ``path`` is written into a WriteError."""
    try:
        yield
    except OSError as error:
        named = str(error.filename or TEMPORARY)
        raise WriteError(path if named.endswith(TEMPORARY) else named, error.strerror or str(error)) from None


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files of killed processes in a folder."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
