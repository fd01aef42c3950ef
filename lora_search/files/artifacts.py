"""Copies of the trials' files at artifacts.uri: any place that fsspec knows (s3://, gs://, a shared folder).

A node with another disk resumes a trial from its last rung there; local files are a cache. A rung goes up as
files named by their SHA-256, and a manifest after them: a manifest that can be read names whole files, so a
rung is there whole or not at all. Uploads run in a thread; training waits for one only at a trial's end.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from lora_search.errors import ConfigError, LoraSearchError
from lora_search.files.atomic import TEMPORARY, explained_writing, replacing, write_file
from lora_search.settings.schema import require
from lora_search.settings.secrets import redact

logger = logging.getLogger(__name__)

PARTS = ("checkpoint", "adapter")  # folders of a trial that go up; of its other files, the scores of rows
SCORES = "*.npz"
STAGED = ".upload"  # begins the name of a folder of hard links: what it holds does not change any more
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci"}
MANIFEST = "manifest-"  # then the rung in five digits
RUNG_END = len(MANIFEST) + 5
MARK = ".artifacts.json"  # in a trial's folder: the manifest that its files were last the same as

Manifest = dict[str, Any]  # {"rung": int, "files": {path in the trial's folder: SHA-256}}


class ArtifactError(LoraSearchError):
    """A file at artifacts.uri cannot be written or read."""

    def __init__(self, uri: str, cause: str) -> None:
        super().__init__(
            f"artifacts.uri: {redact(uri)} cannot be used: {cause}. Nothing is lost: the files are in "
            "runs_dir. Run the same command again when it can be."
        )


class Artifacts:
    """The files of one study's trials, at ``uri``/``study``."""

    def __init__(self, uri: str, study: str) -> None:
        """Raises ConfigError if no file system supports the URI."""
        self.uri = uri
        self.files, root = _connect(uri)
        self.root = f"{root}/{study}"
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="artifacts")
        self._last: dict[int, tuple[Future[None], Path]] = {}  # the upload of a trial, and what it sends
        self._known: dict[int, tuple[Path, int]] = {}  # folder and last rung of the trials that were put

    def close(self) -> None:
        """Wait until all started uploads are finished."""
        self._uploads.shutdown()

    def put(self, trial: int, folder: Path, rung: int) -> None:
        """Upload the trial's files as they are now. This replaces an upload that has not started."""
        if trial in self._last:
            upload, sent = self._last[trial]
            if upload.cancel():
                shutil.rmtree(sent, ignore_errors=True)
        staged = _stage(folder)
        self._known[trial] = folder, rung
        self._last[trial] = self._uploads.submit(self._upload, trial, folder, staged, rung), staged

    def put_end(self, trial: int) -> None:
        """Upload the final files of a trial, without its checkpoint if that is deleted here."""
        if trial in self._known:
            self.put(trial, *self._known.pop(trial))
            self._known.pop(trial)

    def settle(self, trial: int) -> None:
        """Wait until the last upload is finished. Raises ArtifactError."""
        if trial not in self._last:
            return
        upload, _ = self._last.pop(trial)
        if (error := upload.exception()) is not None:
            raise ArtifactError(self.uri, cause_of(error))

    def fetch(self, trial: int, folder: Path, suffix: str = "") -> int | None:
        """Bring the trial's files where the place has a later rung than the folder; return that rung. With
        a suffix bring only files that end with it.

        Files that are not as they were sent count as missing: then the rung before them is brought. Raises
        ArtifactError.
        """
        self._finish_uploads()
        here = _rung_of(folder)
        with _explained(self.uri):
            for path in self._manifests(trial):
                found = self._read(path)
                if found is None or (here is not None and found["rung"] <= here):
                    continue
                if self._bring(trial, found, folder, suffix):
                    return int(found["rung"])
        return None

    def _finish_uploads(self) -> None:
        wait([upload for upload, _ in self._last.values()])

    def publish(self, folder: Path, name: str) -> None:
        """Copy a file, or a folder with its files, under the names they have. Raises ArtifactError."""
        with _explained(self.uri):
            for path in [folder] if folder.is_file() else _files(folder):
                self._send(
                    path, f"{self.root}/{name}/{path.relative_to(folder).as_posix()}".removesuffix("/.")
                )

    def bring(self, name: str, target: Path) -> None:
        """Copy what was published under the name to a path that does not exist here. Raises ArtifactError."""
        place = f"{self.root}/{name}"
        with _explained(self.uri):
            self.files.invalidate_cache()
            found = {path[len(place) + 1 :]: self.files.cat_file(path) for path in self.files.find(place)}
        if "" in found:  # a file, not a folder
            write_file(target, found[""])
        elif found:
            fresh = target.with_name(f"{target.name}.{os.getpid()}{TEMPORARY}")
            for inner, content in found.items():
                write_file(fresh / inner, content)
            with explained_writing(target):
                fresh.rename(target)

    def delete(self) -> None:
        """Remove all of the study's files here. Raises ArtifactError."""
        with _explained(self.uri):
            if self.files.exists(self.root):
                self.files.rm(self.root, recursive=True)

    def _upload(self, trial: int, folder: Path, staged: Path, rung: int) -> None:
        """Upload the missing files, then the manifest; then remove the files that it does not name."""
        try:
            sums = {path.relative_to(staged).as_posix(): sha256(path) for path in _files(staged)}
            there = set(self._names(f"{self._place(trial)}/files"))
            for name, digest in sums.items():
                if digest not in there:
                    self._send(staged / name, f"{self._place(trial)}/files/{digest}")
            manifest = {"rung": rung, "files": sums}
            kept = f"{MANIFEST}{rung:05d}-{_seal(manifest)[:12]}.json"
            self._write(f"{self._place(trial)}/{kept}", json.dumps(manifest).encode())
            _mark(folder, manifest)
            self._clean(trial, kept)
        except Exception as error:
            logger.warning("%s; tried again at the next rung", ArtifactError(self.uri, cause_of(error)))
            raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _clean(self, trial: int, kept: str) -> None:
        """Remove the manifests of earlier rungs and the files that none names any more. Those of later rungs
        are another worker's, which has taken the trial over."""
        place, named = self._place(trial), set()
        for path in self._manifests(trial):
            name = path.rsplit("/", 1)[-1]
            if name != kept and name[:RUNG_END] <= kept[:RUNG_END]:
                self.files.rm_file(path)
            else:
                named |= set((self._read(path) or {"files": {}})["files"].values())
        for name in set(self._names(f"{place}/files")) - named:
            self.files.rm_file(f"{place}/files/{name}")

    def _bring(self, trial: int, manifest: Manifest, folder: Path, suffix: str) -> bool:
        """Download the files of a manifest to the folder; return False if one is damaged."""
        contents = {}
        for name, digest in manifest["files"].items():
            if not name.endswith(suffix):
                continue
            path = f"{self._place(trial)}/files/{digest}"
            content = self._content(path)
            if hashlib.sha256(content).hexdigest() != digest:
                logger.warning("trial %d: %s of rung %d at artifacts.uri is damaged or missing",
                               trial, name, manifest["rung"])  # fmt: skip
                return False
            contents[name] = content
        for name, content in contents.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
        if not suffix:
            _mark(folder, manifest)
        return True

    def _manifests(self, trial: int) -> list[str]:
        """Return the paths of the manifests, the latest rung first."""
        names = [name for name in self._names(self._place(trial)) if name.startswith(MANIFEST)]
        return [f"{self._place(trial)}/{name}" for name in sorted(names, reverse=True)]

    def _read(self, path: str) -> Manifest | None:
        try:
            found = json.loads(self._content(path))
            is_whole = isinstance(found["rung"], int) and all(map(_is_inside, found["files"]))
        except (ValueError, KeyError, TypeError):
            return None
        return found if is_whole else None

    def _content(self, path: str) -> bytes:
        """Return an object's bytes; none if it is missing, since another worker may have removed it."""
        try:
            return bytes(self.files.cat_file(path))
        except FileNotFoundError:
            return b""

    def _names(self, place: str) -> list[str]:
        """Return the names below a folder; empty if the folder does not exist."""
        self.files.invalidate_cache()
        try:
            return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.files.ls(place, detail=False)]
        except FileNotFoundError:
            return []

    def _place(self, trial: int) -> str:
        return f"{self.root}/trials/{trial}"

    def _send(self, path: Path, to: str) -> None:
        self._write(to, path.read_bytes())

    def _write(self, to: str, content: bytes) -> None:
        """Write one object. Only object stores do so atomically, so readers compare its digest."""
        _make_folder(self.files, to.rsplit("/", 1)[0])
        self.files.pipe_file(to, content)


def place_of(study: str, study_id: str | None) -> str:
    """Return the name of a study's folder at artifacts.uri; a new study of the same name gets another."""
    return f"{study}-{study_id}" if study_id else study


def check_uri(uri: str) -> None:
    """Raise ConfigError unless files can be written, read and removed there."""
    files, root = _connect(uri)
    probe, text = f"{root}/.probe-{uuid.uuid4().hex}", b"lora_search"
    try:
        _make_folder(files, root)
        files.pipe_file(probe, text)
        found = files.cat_file(probe)
        files.rm_file(probe)
    except Exception as error:  # noqa: BLE001  (each file system raises its own)
        rule = f"must be a place that can be written to and read ({cause_of(error)})"
        raise ConfigError("artifacts.uri", redact(uri), rule, REMEDY) from None
    require(found == text, "artifacts.uri", redact(uri), "must give back what was written", REMEDY)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Raise ArtifactError for whatever is raised here."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (each file system raises its own)
        raise ArtifactError(uri, cause_of(error)) from None


def _make_folder(files: Any, path: str) -> None:
    """Create a folder, if the file system has folders; in an object store this would create a bucket."""
    protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
    if not protocols & OBJECT_STORES:
        files.makedirs(path, exist_ok=True)


def _connect(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI and the path in it. Raises ConfigError."""
    try:
        files, root = fsspec.core.url_to_fs(uri)
    except Exception as error:  # noqa: BLE001  (each file system raises its own)
        rule = f"must be a URI that fsspec opens ({cause_of(error)})"
        raise ConfigError("artifacts.uri", redact(uri), rule, REMEDY) from None
    return files, root.rstrip("/")


REMEDY = (
    "Try s3://bucket/folder (with `pip install s3fs`, keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "another server in AWS_ENDPOINT_URL) or a folder that all nodes share; null keeps files here only"
)


def cause_of(error: BaseException) -> str:
    """Return the first line of a file system's error, or its type."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def sha256(path: Path) -> str:
    """Return the digest of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_staged(folder: Path) -> None:
    """Remove the pending uploads of killed processes."""
    for left in folder.glob(f"{STAGED}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _stage(folder: Path) -> Path:
    """Return a folder of hard links to the files to upload: the originals are replaced, never changed."""
    staged = folder / f"{STAGED}-{uuid.uuid4().hex}"
    for path in [*folder.glob(SCORES), *(file for part in PARTS for file in _files(folder / part))]:
        target = staged / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, target)
    return staged


def _files(folder: Path) -> list[Path]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not path.name.endswith(TEMPORARY)]


def _rung_of(folder: Path) -> int | None:
    """Return the last rung of the trial's local files; None if there are none."""
    names = [path.stem.removeprefix("rung-") for path in (folder / "checkpoint").glob("rung-*.safetensors")]
    rungs = [int(name) for name in names if name.isdigit()]
    with suppress(OSError, ValueError, KeyError, TypeError):
        rungs.append(int(json.loads((folder / MARK).read_bytes())["rung"]))
    return max(rungs, default=None)


def _mark(folder: Path, manifest: Mapping[str, object]) -> None:
    with replacing(folder / MARK) as temporary:
        temporary.write_bytes(json.dumps(manifest).encode())


def _seal(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    """Whether a path of a manifest stays within the trial's folder."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts
