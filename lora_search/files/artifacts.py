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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lora_search.files.atomic import TEMPORARY, replacing
from lora_search.files.place import DELETE, READ, WRITE, ArtifactError, Place, cause_of

logger = logging.getLogger(__name__)

PARTS = ("checkpoint", "adapter")  # folders of a trial that go up; of its other files, the scores of rows
SCORES = "*.npz"
STAGED = ".upload"  # begins the name of a folder of hard links: what it holds does not change any more
MANIFEST = "manifest-"  # then the rung in five digits
RUNG_END = len(MANIFEST) + 5
MARK = ".artifacts.json"  # in a trial's folder: the manifest that its files were last the same as
READERS = 16  # copies that are fetched at the same time: each waits for one request after the other

Manifest = dict[str, Any]  # {"rung": int, "files": {path in the folder: SHA-256}}


class Artifacts:
    """The files of one study, at ``uri``/``study``: of its trials, and of what its machines share."""

    def __init__(self, uri: str, study: str) -> None:
        """Raises ConfigError if no file system supports the URI."""
        self.place = Place(uri)
        self.root = f"{self.place.root}/{study}"
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
            raise ArtifactError(self.place.uri, WRITE, cause_of(error))

    def fetch(self, trial: int, folder: Path) -> int | None:
        """Bring the trial's files where the place has a later rung than the folder; return that rung.

        Files that are not as they were sent count as missing: then the rung before them is brought. Raises
        ArtifactError.
        """
        wait([upload for upload, _ in self._last.values()])
        with self.place.explained(READ):
            self.place.forget_listings()
            return self._fetch(trial, folder, "")

    def fetch_all(self, wanted: Mapping[int, str], folder: Path) -> None:
        """Bring the files of many trials in the same way, several at a time: trial -> what the names of its
        files must end with. ``folder`` has a folder for each. Raises ArtifactError."""
        wait([upload for upload, _ in self._last.values()])
        with self.place.explained(READ):
            self.place.forget_listings()
            _all_at_once(partial(self._fetch, n, folder / str(n), end) for n, end in wanted.items())

    def share(self, name: str, folder: Path) -> None:
        """Copy a file of the folder, or a folder in it with its files, in place of an older copy. Raises
        ArtifactError."""
        with self.place.explained(WRITE):
            named = {file.relative_to(folder).as_posix(): file for file in files_of(folder / name)}
            self._send(f"{self.root}/shared/{name}", named, 0)

    def bring(self, names: Iterable[str], folder: Path) -> None:
        """Bring what was shared under the names and is as it was sent. A folder must not exist here. Raises
        ArtifactError."""
        with self.place.explained(READ):
            self.place.forget_listings()
            _all_at_once(partial(self._bring_shared, name, folder) for name in names)

    def show(self, path: Path, name: str) -> None:
        """Copy a file, or a folder with its files, for people, under the names they have. Raises
        ArtifactError."""
        with self.place.explained(WRITE):
            for file in files_of(path):
                inner = "" if file == path else f"/{file.relative_to(path).as_posix()}"
                self.place.write(f"{self.root}/{name}{inner}", file.read_bytes())

    def delete(self) -> None:
        """Remove all of the study's files here. Raises ArtifactError."""
        with self.place.explained(DELETE):
            self.place.forget_listings()
            if self.place.names(self.root):  # fsspec's exists() takes any error for a no
                self.place.files.rm(self.root, recursive=True)

    def _upload(self, trial: int, folder: Path, staged: Path, rung: int) -> None:
        try:
            files = {path.relative_to(staged).as_posix(): path for path in files_of(staged)}
            _mark(folder, self._send(self._of(trial), files, rung))
        except Exception as error:
            told = ArtifactError(self.place.uri, WRITE, cause_of(error))
            logger.warning("%s; tried again at the next rung", told)
            raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _send(self, place: str, files: Mapping[str, Path], rung: int) -> Manifest:
        """Upload the missing files, then the manifest; then remove the files that it does not name."""
        sums = {name: sha256(path) for name, path in files.items()}
        self.place.forget_listings()
        there = self.place.sizes(f"{place}/files")
        for name, digest in sums.items():
            if digest not in there or there[digest] not in (None, files[name].stat().st_size):
                self.place.write(f"{place}/files/{digest}", files[name].read_bytes())
        manifest = {"rung": rung, "files": sums}
        kept = f"{MANIFEST}{rung:05d}-{_seal(manifest)[:12]}.json"
        self.place.write(f"{place}/{kept}", json.dumps(manifest).encode())
        self._clean(place, kept)
        return manifest

    def _clean(self, place: str, kept: str) -> None:
        """Remove the manifests of earlier rungs and the files that none names any more. Those of later rungs
        are another worker's, which has taken the trial over."""
        self.place.forget_listings()
        named = set()
        for path in self._manifests(place):
            name = path.rsplit("/", 1)[-1]
            if name != kept and name[:RUNG_END] <= kept[:RUNG_END]:
                self.place.remove(path)
            else:
                named |= set((self._read(path) or {"files": {}})["files"].values())
        for name in set(self.place.names(f"{place}/files")) - named:
            self.place.remove(f"{place}/files/{name}")

    def _fetch(self, trial: int, folder: Path, suffix: str) -> int | None:
        found = self._bring_last(self._of(trial), folder, suffix, _rung_of(folder))
        if found is not None and not suffix:
            _mark(folder, found)
        return None if found is None else int(found["rung"])

    def _bring_last(
        self, place: str, folder: Path, suffix: str = "", here: int | None = None
    ) -> Manifest | None:
        """Bring the files of the last manifest beyond the rung ``here`` whose files are whole; return it."""
        for path in self._manifests(place):
            found = self._read(path)
            if found is None or (here is not None and found["rung"] <= here):
                continue
            if self._bring(place, found, folder, suffix):
                return found
        return None

    def _bring(self, place: str, manifest: Manifest, folder: Path, suffix: str) -> bool:
        """Download the files of a manifest to the folder; return False if one is damaged."""
        contents = {}
        for name, digest in manifest["files"].items():
            if not name.endswith(suffix):
                continue
            content = self.place.content(f"{place}/files/{digest}")
            if hashlib.sha256(content).hexdigest() != digest:
                what = place.removeprefix(f"{self.root}/").replace("trials/", "trial ")
                logger.warning("%s: %s of rung %d at artifacts.uri is damaged or missing",
                               what, name, manifest["rung"])  # fmt: skip
                return False
            contents[name] = content
        for name, content in contents.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
        return True

    def _manifests(self, place: str) -> list[str]:
        """Return the paths of the manifests, the latest rung first."""
        names = [name for name in self.place.names(place) if name.startswith(MANIFEST)]
        return [f"{place}/{name}" for name in sorted(names, reverse=True)]

    def _read(self, path: str) -> Manifest | None:
        try:
            found = json.loads(self.place.content(path))
            is_whole = isinstance(found["rung"], int) and all(map(_is_inside, found["files"]))
        except (ValueError, KeyError, TypeError):
            return None
        return found if is_whole else None

    def _bring_shared(self, name: str, folder: Path) -> None:
        fresh = folder / f"{STAGED}-{uuid.uuid4().hex}"
        try:
            if self._bring_last(f"{self.root}/shared/{name}", fresh) is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _move(fresh / name, folder / name)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _of(self, trial: int) -> str:
        return f"{self.root}/trials/{trial}"


def place_of(study: str, study_id: str | None) -> str:
    """Return the name of a study's folder at artifacts.uri; a new study of the same name gets another."""
    return f"{study}-{study_id}" if study_id else study


def _all_at_once(calls: Iterable[Callable[[], object]]) -> None:
    """Make the calls, READERS at a time. Raises the first error, or an interrupt, and waits for no other."""
    readers = ThreadPoolExecutor(READERS)
    try:
        for one in as_completed([readers.submit(call) for call in calls]):
            one.result()
    finally:
        readers.shutdown(wait=False, cancel_futures=True)


def _move(fresh: Path, to: Path) -> None:
    """Rename; a folder that another process has brought meanwhile stays."""
    try:
        fresh.replace(to)
    except OSError:
        if not to.is_dir():
            raise


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
    for path in [*folder.glob(SCORES), *(file for part in PARTS for file in files_of(folder / part))]:
        target = staged / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, target)
    return staged


def files_of(folder: Path) -> list[Path]:
    """Return the files below a folder, without unfinished ones; of a file, itself."""
    found = (path for path in (folder, *sorted(folder.rglob("*"))) if path.is_file())
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
