"""Copies of trials' files: in a folder, and on a real S3 server."""

import itertools
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lora_search.engine.engine import Engine
from lora_search.errors import ConfigError
from lora_search.files.artifacts import READERS, Artifacts, sha256
from lora_search.files.place import ArtifactError, check_uri
from lora_search.trial import Measurement, TrialRun
from tests.conftest import make_run
from tests.engine.test_checkpoint import (
    SPLITS,
    adapter_note,
    as_known,
    finish,
    perplexity_of_adapter,
    train_until,
)
from tests.engine.test_engine import perplexities
from tests.harness import build_engine, train_all
from tests.servers import real_s3


@pytest.fixture(scope="module", params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where copies go: the URI of each kind of place."""
    if request.param == "folder":
        yield str(tmp_path_factory.mktemp("shared") / "not made yet")
        return
    with real_s3() as environment, pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield "s3://bucket/runs"
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def copies(place: str, request: pytest.FixtureRequest) -> Iterator[Artifacts]:
    found = Artifacts(place, f"study-{abs(hash(request.node.name)):x}")
    yield found
    found.close()


def folder_of(tmp_path: Path, node: str, rung: int, adapter: bytes = b"adapter") -> Path:
    folder = tmp_path / node
    for name, content in {
        f"checkpoint/rung-{rung:05d}.safetensors": f"state {rung}".encode(),
        "adapter/adapter_model.safetensors": adapter,
        "adapter/adapter_config.json": b"{}",
        "validation_rows.npz": b"rows",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def objects(copies: Artifacts) -> list[str]:
    copies.place.files.invalidate_cache()
    return sorted(str(path).rsplit("/", 1)[-1] for path in copies.place.files.find(copies.root))


def test_what_was_put_comes_to_a_node_that_never_saw_it(copies: Artifacts, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a", 3)
    copies.put(7, folder, 3)
    copies.settle(7)

    rung = copies.fetch(7, tmp_path / "b")

    assert rung == 3
    assert contents(tmp_path / "b") == contents(folder)
    assert copies.fetch(7, tmp_path / "b") is None  # it is here by now
    assert copies.fetch(8, tmp_path / "c") is None


def test_what_machines_share_comes_back_as_it_was_sent_last(copies: Artifacts, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a", 3)
    copies.share("validation_rows.npz", folder)
    (folder / "validation_rows.npz").write_bytes(b"newer rows")
    for name in ("adapter", "validation_rows.npz", "checkpoint/rung-00003.safetensors"):
        copies.share(name, folder)

    copies.bring(["adapter", "validation_rows.npz", "samples.json"], tmp_path / "b")

    assert contents(tmp_path / "b/adapter") == contents(folder / "adapter")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["adapter", "validation_rows.npz"]
    assert (tmp_path / "b/validation_rows.npz").read_bytes() == b"newer rows"


@pytest.mark.parametrize("content", [b"", b"something else"])
def test_what_machines_share_is_left_where_one_of_its_files_is_damaged(
    copies: Artifacts, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path, "a", 3)
    copies.share("adapter", folder)
    paths = [path for path in copies.place.files.find(copies.root) if "/files/" in path]
    assert len(paths) == 2
    copies.place.files.pipe_file(paths[1], content)

    copies.bring(["adapter"], tmp_path / "b")

    assert "shared/adapter: adapter/adapter_" in caplog.text
    assert not (tmp_path / "b").exists()


def test_what_people_look_at_has_its_own_names_there(copies: Artifacts, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a", 3)
    copies.show(folder / "adapter", "best")
    copies.show(folder / "validation_rows.npz", "report.html")

    assert objects(copies) == ["adapter_config.json", "adapter_model.safetensors", "report.html"]


class Gate:
    """A file system whose readers wait until so many read at the same time."""

    def __init__(self, files: Any, count: int) -> None:
        self._files, self._together = files, threading.Barrier(count, timeout=60)
        self.num_read = 0

    def cat_file(self, path: str) -> bytes:
        if "/files/" in path:
            self._together.wait()
            self.num_read += 1
        return bytes(self._files.cat_file(path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def test_the_files_of_many_trials_are_fetched_at_the_same_time(copies: Artifacts, tmp_path: Path) -> None:
    for number in range(READERS):
        copies.put(number, folder_of(tmp_path, str(number), 3, f"adapter {number}".encode()), 3)
        copies.settle(number)
    copies.place.files = gate = Gate(copies.place.files, READERS)

    copies.fetch_all(dict.fromkeys(range(READERS), "adapter_model.safetensors"), tmp_path / "b")

    assert gate.num_read == READERS  # one request each, of the files that were asked for, and none alone
    brought = contents(tmp_path / "b")
    assert brought == {
        f"{number}/adapter/adapter_model.safetensors": f"adapter {number}".encode()
        for number in range(READERS)
    }


class Refusing(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system that takes no file any more."""

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[str]:
        raise FileNotFoundError(path)

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        raise PermissionError("quota exceeded")


class Slow(Refusing):
    """A place where a request fails: some at once, the others only when they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked, self.let_go = itertools.count(), threading.Event()

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[str]:
        if next(self.num_asked) == READERS - 1:
            raise PermissionError("no way in")
        self.let_go.wait(60)
        raise PermissionError("later")


def test_the_first_error_is_told_at_once_and_nothing_more_is_asked_for(tmp_path: Path) -> None:
    copies = Artifacts(str(tmp_path / "place"), "study")
    copies.place.files = files = Slow()
    for fetch in (
        lambda: copies.fetch_all(dict.fromkeys(range(20 * READERS), ""), tmp_path / "b"),
        lambda: copies.bring(map(str, range(20 * READERS)), tmp_path / "c"),
    ):
        files.num_asked = itertools.count()
        with pytest.raises(ArtifactError, match="cannot be read: no way in"):
            fetch()
        assert next(files.num_asked) <= READERS + 1
    files.let_go.set()
    copies.close()


def test_a_folder_that_another_process_has_brought_meanwhile_stays(copies: Artifacts, tmp_path: Path) -> None:
    copies.share("adapter", folder_of(tmp_path, "a", 3))
    there = folder_of(tmp_path, "b", 3, b"brought by another")

    copies.bring(["adapter"], there)

    assert contents(there)["adapter/adapter_model.safetensors"] == b"brought by another"
    assert not list(there.glob(".upload*"))


def test_only_the_last_rung_stays_there_and_a_checkpoint_goes_with_its_trial(
    copies: Artifacts, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, "a", 3)
    copies.put(7, folder, 3)
    copies.settle(7)
    (folder / "checkpoint/rung-00003.safetensors").unlink()
    folder_of(tmp_path, "a", 4, b"better")
    copies.put(7, folder, 4)
    copies.settle(7)
    then = objects(copies)
    (folder / "checkpoint/rung-00004.safetensors").unlink()
    copies.put_end(7)
    copies.settle(7)

    assert len(then) == 5  # checkpoint, two files of the adapter, rows, manifest
    assert len(objects(copies)) == 4
    assert not list(folder.glob(".upload*"))


def test_files_here_that_are_later_stay(copies: Artifacts, tmp_path: Path) -> None:
    copies.put(7, folder_of(tmp_path, "a", 3), 3)
    copies.settle(7)
    later = folder_of(tmp_path, "b", 5, b"later")

    assert copies.fetch(7, later) is None
    assert contents(later)["adapter/adapter_model.safetensors"] == b"later"


def test_a_late_upload_of_a_worker_that_lost_the_trial_removes_nothing(
    copies: Artifacts, place: str, tmp_path: Path
) -> None:
    copies.put(7, folder_of(tmp_path, "a", 5, b"later"), 5)
    copies.settle(7)
    late = Artifacts(place, copies.root.rsplit("/", 1)[-1])
    late.put(7, folder_of(tmp_path, "b", 3, b"late"), 3)
    late.settle(7)
    late.close()

    assert copies.fetch(7, tmp_path / "c") == 5
    assert contents(tmp_path / "c")["adapter/adapter_model.safetensors"] == b"later"


@pytest.mark.parametrize("content", [b"", b"something else"])
def test_a_damaged_copy_is_named_and_never_used(
    copies: Artifacts, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    copies.put(7, folder_of(tmp_path, "a", 3), 3)
    copies.settle(7)
    paths = [path for path in copies.place.files.find(copies.root) if "/files/" in path]
    copies.place.files.pipe_file(paths[0], content)

    assert copies.fetch(7, tmp_path / "b") is None
    assert "of rung 3 at artifacts.uri is damaged or missing" in caplog.text
    assert not (tmp_path / "b").exists()


def test_a_short_copy_of_an_older_version_is_replaced(copies: Artifacts, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a", 3)
    name = f"{copies.root}/trials/7/files/{sha256(folder / 'validation_rows.npz')}"
    copies.place.write(name, b"ro")

    copies.put(7, folder, 3)
    copies.settle(7)

    assert copies.fetch(7, tmp_path / "b") == 3
    assert contents(tmp_path / "b") == contents(folder)


class Killed(BaseException):
    """Ends a process in the middle of a write."""


class HalfWritten:
    """A mounted folder whose writer is killed after the first half of a file."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def pipe_file(self, path: str, content: bytes) -> None:
        self._files.pipe_file(path, content[: len(content) // 2])
        raise Killed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def test_a_kill_in_the_middle_of_a_write_leaves_no_short_file_under_its_name(tmp_path: Path) -> None:
    copies, folder = Artifacts(str(tmp_path / "place"), "study"), folder_of(tmp_path, "a", 3)
    whole = copies.place.files
    copies.place.files = HalfWritten(whole)
    with pytest.raises(Killed):
        copies.share("adapter", folder)
    left = objects(copies)
    copies.place.files = whole
    copies.share("adapter", folder)
    copies.close()

    assert len(left) == 1
    assert left[0].endswith(".tmp")
    assert len(objects(copies)) == 3  # two files and the manifest: what was left is removed
    copies.bring(["adapter"], tmp_path / "b")
    assert contents(tmp_path / "b/adapter") == contents(folder / "adapter")


def test_a_manifest_cannot_lead_out_of_the_trials_folder(copies: Artifacts, tmp_path: Path) -> None:
    copies.put(7, folder_of(tmp_path, "a", 3), 3)
    copies.settle(7)
    (path,) = (path for path in copies.place.files.find(copies.root) if "manifest-" in path)
    manifest = json.loads(copies.place.files.cat_file(path))
    manifest["files"]["../../outside"] = manifest["files"]["validation_rows.npz"]
    copies.place.files.pipe_file(path, json.dumps(manifest).encode())

    assert copies.fetch(7, tmp_path / "deep" / "b") is None
    assert not (tmp_path / "outside").exists()


def test_a_trial_goes_on_bitwise_on_a_node_that_never_saw_its_disk(
    copies: Artifacts, tiny_llama: Path, tmp_path: Path
) -> None:
    changes = {"dropout": 0.1, "lr": 5e-3}
    whole = train_all(build_engine(tiny_llama, SPLITS), [make_run(tmp_path / "whole", **changes)])[0]
    before, _ = train_on_a_node(tiny_llama, make_run(tmp_path / "a", **changes), copies, upto=3)
    other = make_run(tmp_path / "b", **changes)
    rest, engine = train_on_a_node(tiny_llama, as_known(other, before), copies)
    engine.drop_checkpoint_copy(other.number)
    copies.fetch(other.number, tmp_path / "c")

    assert [m.rung for m in rest] == [4]
    assert perplexities([*before, *rest]).tolist() == perplexities(whole).tolist()
    assert adapter_note(other)["rung"] == whole[-1].best_rung
    kept = contents(tmp_path / "c")
    assert (
        kept["adapter/adapter_model.safetensors"]
        == (Path(other.folder) / "adapter/adapter_model.safetensors").read_bytes()
    )
    assert perplexity_of_adapter(tiny_llama, other) == pytest.approx(whole[-1].best_perplexity, rel=1e-4)


def train_on_a_node(
    base: Path, run: TrialRun, copies: Artifacts, upto: int | None = None
) -> tuple[list[Measurement], Engine]:
    """Train to a rung and leave the trial there as a kill does, or train to its end."""
    engine = build_engine(base, SPLITS)
    engine.keep_copies(copies)
    if upto is not None:
        curve = train_until(engine, run, upto)
        copies.settle(run.number)
        return curve, engine
    engine.admit([run])
    return finish(engine), engine


def test_a_place_that_takes_nothing_is_refused_with_its_cause(place: str, tmp_path: Path) -> None:
    check_uri(place)
    (tmp_path / "a file").touch()
    bad = "s3://no-such-bucket/x" if place.startswith("s3") else str(tmp_path / "a file" / "x")

    with pytest.raises(
        ConfigError, match=r"artifacts.uri: must be a place that can be written to and read"
    ) as told:
        check_uri(bad)
    assert bad in str(told.value)


@pytest.mark.parametrize("uri", ["nosuch://bucket/x", "http://127.0.0.1:9/x", "gs://bucket/x"])
def test_a_uri_that_no_file_system_takes_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"artifacts.uri: must be a .* got '.*'. Try s3://bucket/folder"):
        check_uri(uri)


def test_an_upload_that_fails_is_one_warning_and_ends_the_trial_only_at_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copies = Artifacts(str(tmp_path / "place"), "study")
    copies.place.files = Refusing()
    folder = folder_of(tmp_path, "a", 3)
    with caplog.at_level(logging.WARNING):
        copies.put(7, folder, 3)
        with pytest.raises(
            ArtifactError, match=r"artifacts.uri: .* cannot be written to: quota exceeded. Nothing is lost"
        ):
            copies.settle(7)
    copies.close()

    assert caplog.text.count("quota exceeded") == 1
    assert contents(folder)["validation_rows.npz"] == b"rows"
    assert not list(folder.glob(".upload*"))


def test_a_place_that_cannot_be_read_is_not_said_to_have_lost_nothing(tmp_path: Path) -> None:
    copies = Artifacts(str(tmp_path / "place"), "study")
    copies.place.files = Unreadable()

    with pytest.raises(ArtifactError, match=r"cannot be read: no way in. What this machine's disk lacks is"):
        copies.fetch_all({7: ""}, tmp_path / "trials")
    with pytest.raises(ArtifactError, match=r"cannot be read: no way in"):
        copies.bring(["tokenizer"], tmp_path / "b")
    copies.close()


class Unreadable(Refusing):
    def ls(self, path: str, detail: bool = True, **_: Any) -> list[str]:
        raise PermissionError("no way in")
