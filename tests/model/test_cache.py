"""A large file is read once for its digest; whatever happens to the cache, the digest is the file's."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from lora_search.model.cache import SETTLED_SECONDS, cached, file_digest
from lora_search.model.digest import weight_files


@pytest.fixture
def old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file, and an empty cache."""
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"1" * 1000)
    return path


def read(path: Path) -> str:
    return file_digest(path, settled_seconds=-1.0)  # or each test would have to wait


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def notes(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/digests").glob("*"))


def test_a_file_is_read_once(old_file: Path, tmp_path: Path) -> None:
    first = read(old_file)
    (note,) = notes(tmp_path)
    written = note.stat().st_mtime_ns

    assert first == read(old_file) == sha256(old_file)
    assert notes(tmp_path) == [note]
    assert note.stat().st_mtime_ns == written


def test_a_changed_file_of_the_same_size_and_time_is_read_again(old_file: Path) -> None:
    read(old_file)
    before = old_file.stat()

    old_file.write_bytes(b"2" * 1000)
    os.utime(old_file, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert read(old_file) == sha256(old_file)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"file": [], "sha256": "0", "seal": "0"}', None])
def test_a_damaged_note_is_not_believed(old_file: Path, tmp_path: Path, damage: bytes | None) -> None:
    digest = read(old_file)
    (note,) = notes(tmp_path)
    note.write_bytes(note.read_bytes().replace(digest.encode(), b"0" * 64) if damage is None else damage)

    assert read(old_file) == digest
    assert digest.encode() in note.read_bytes()


def test_a_cache_that_takes_nothing_only_costs_time(old_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")

    assert read(old_file) == sha256(old_file)


def test_a_file_that_has_just_changed_is_not_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"1")
    assert time.time() - path.stat().st_mtime < SETTLED_SECONDS

    file_digest(path)

    assert notes(tmp_path) == []


def test_what_is_cached_may_be_read_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))

    def make(folder: Path) -> None:
        (folder / "weights").touch(0o600)

    folder = cached("model", make)

    assert folder.stat().st_mode & 0o777 == 0o777 & ~current_umask()
    assert (folder / "weights").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_weights_are_the_files_that_transformers_loads(tmp_path: Path) -> None:
    index = (
        '{"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-1.safetensors"}}'
    )
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "training_args.bin").touch()

    assert [path.name for path in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
