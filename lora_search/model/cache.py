"""This machine's cache: created and converted models, and the digests of large files."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lora_search.errors import WriteError
from lora_search.files.atomic import write_file

SETTLED_SECONDS = 2.0  # a younger file may change again within the resolution of its timestamps


def cache_folder() -> Path:
    """Return the cache folder: LORA_SEARCH_CACHE, or ~/.cache/lora_search."""
    return Path(os.environ.get("LORA_SEARCH_CACHE", "~/.cache/lora_search")).expanduser()


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """Return the cached folder of that name; create it if missing. Two processes may do so at once."""
    target = cache_folder() / name
    if target.is_dir():
        return target
    temporary = target.with_name(f"{name}.{os.getpid()}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        make(temporary)
        _share(temporary)
        temporary.replace(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _share(folder: Path) -> None:
    """Give each file the permissions of the folder: safetensors makes its files private to the user."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)


def file_digest(path: Path, settled_seconds: float = SETTLED_SECONDS) -> str:
    """Return the SHA-256 of a file. It is read again only if its size or one of its times has changed.

    Raises OSError.
    """
    before = _state(path)
    note = cache_folder() / "digests" / f"{hashlib.sha256(before[0].encode()).hexdigest()}.json"
    known = _read_note(note, before)
    if known is not None:
        return known
    begun = time.time()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _state(path) == before and begun - max(before[2:4]) / 1e9 > settled_seconds:
        with suppress(OSError, WriteError):  # without a writable cache it only takes longer
            write_file(
                note, json.dumps({"file": before, "sha256": digest, "seal": _seal(before, digest)}).encode()
            )
    return digest


def _state(path: Path) -> tuple[str, int, int, int, int]:
    """Return what changes with the content: `cp -p` keeps the mtime, but nothing can set the ctime."""
    real = path.resolve()
    status = real.stat()
    return str(real), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read_note(note: Path, state: tuple[str, int, int, int, int]) -> str | None:
    """Return the digest cached for this state of the file; None without an intact entry."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(note.read_bytes())
        digest = stored["sha256"]
        if tuple(stored["file"]) == state and stored["seal"] == _seal(state, digest):
            return str(digest)
    return None


def _seal(state: tuple[str, int, int, int, int], digest: str) -> str:
    return hashlib.sha256(json.dumps([*state, digest]).encode()).hexdigest()
