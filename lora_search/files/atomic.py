"""Files that are there whole or not at all: written beside their place, synced to the disk, then renamed.

Whatever the disk refuses (full, over quota, read-only) is one message; the older file stays as it was.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_search.errors import WriteError

TEMPORARY = ".tmp"  # ends the name of a file that is not finished


def write_file(path: Path, content: bytes) -> None:
    """Put the content into the place of an older file, in one go. Raises WriteError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place to write to; once that is on the disk it takes the place of an older file, in one go.
    Raises WriteError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    with explained_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            permissions = temporary.stat().st_mode
            yield temporary
            temporary.chmod(permissions)  # safetensors lets nobody else read what it writes
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refused_writing(folder: Path) -> str | None:
    """Return why no file can be made in a folder, or the folder not be made; None where it can. Leaves
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
    """Turn what the operating system raises while ``path`` is written into a WriteError."""
    try:
        yield
    except OSError as error:
        named = str(error.filename or TEMPORARY)
        raise WriteError(path if named.endswith(TEMPORARY) else named, error.strerror or str(error)) from None


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
