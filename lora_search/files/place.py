"""A place for files that fsspec knows by its URI: s3://, gs://, a shared folder. Its errors are one message,
without keys."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from lora_search.errors import ConfigError, LoraSearchError
from lora_search.files.atomic import TEMPORARY
from lora_search.settings.schema import require
from lora_search.settings.secrets import redact

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci"}
WRITE = "cannot be written to", "Nothing is lost: the files are in runs_dir on this machine"
READ = "cannot be read", "What this machine's disk lacks is only there"
DELETE = "cannot be emptied", "The study is still here; artifacts.uri=null leaves its files there"
REMEDY = (
    "Try s3://bucket/folder (with `pip install s3fs`, keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "another server in AWS_ENDPOINT_URL) or a folder that all nodes share; null keeps files here only"
)


class ArtifactError(LoraSearchError):
    """A file at artifacts.uri cannot be written or read."""

    def __init__(self, uri: str, what: tuple[str, str], cause: str) -> None:
        fault, so = what
        super().__init__(
            f"artifacts.uri: {redact(uri)} {fault}: {cause}. {so}. Run the same command again when it can be."
        )


class Place:
    """Objects with their contents, by path."""

    def __init__(self, uri: str) -> None:
        """Raises ConfigError if no file system supports the URI."""
        self.uri = uri
        try:
            self.files, root = fsspec.core.url_to_fs(uri)
        except Exception as error:  # noqa: BLE001  (each file system raises its own)
            rule = f"must be a URI that fsspec opens ({cause_of(error)})"
            raise ConfigError("artifacts.uri", redact(uri), rule, REMEDY) from None
        self.root = root.rstrip("/")

    def names(self, path: str) -> list[str]:
        """Return the names below a folder; empty if the folder does not exist."""
        try:
            return [str(one).rstrip("/").rsplit("/", 1)[-1] for one in self.files.ls(path, detail=False)]
        except FileNotFoundError:
            return []

    def content(self, path: str) -> bytes:
        """Return an object's bytes; none if it is missing, since another worker may have removed it."""
        try:
            return bytes(self.files.cat_file(path))
        except FileNotFoundError:
            return b""

    def sizes(self, path: str) -> dict[str, int | None]:
        """Return the bytes of each object below a folder, by name; None where that is not known."""
        try:
            found = self.files.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        return {str(one["name"]).rstrip("/").rsplit("/", 1)[-1]: one.get("size") for one in found}

    def write(self, path: str, content: bytes) -> None:
        """Write one object: whole, or not at all under its name."""
        if _is_object_store(self.files):  # which has no folders: making one would create a bucket
            self.files.pipe_file(path, content)
            return
        folder = path.rsplit("/", 1)[0]
        self.files.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{uuid.uuid4().hex}{TEMPORARY}"
        self.files.pipe_file(temporary, content)
        self.files.mv(temporary, path)

    def remove(self, path: str) -> None:
        """Remove one object."""
        self.files.rm_file(path)

    def forget_listings(self) -> None:
        """Read folders anew from now on: other machines write there."""
        self.files.invalidate_cache()

    @contextmanager
    def explained(self, what: tuple[str, str]) -> Iterator[None]:
        """Raise ArtifactError for whatever is raised here."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  (each file system raises its own)
            raise ArtifactError(self.uri, what, cause_of(error)) from None


def check_uri(uri: str) -> None:
    """Raise ConfigError unless files can be written, read and removed there."""
    place = Place(uri)
    probe, text = f"{place.root}/.probe-{uuid.uuid4().hex}", b"lora_search"
    try:
        place.write(probe, text)
        found = place.content(probe)
        place.remove(probe)
    except Exception as error:  # noqa: BLE001  (each file system raises its own)
        rule = f"must be a place that can be written to and read ({cause_of(error)})"
        raise ConfigError("artifacts.uri", redact(uri), rule, REMEDY) from None
    require(found == text, "artifacts.uri", redact(uri), "must give back what was written", REMEDY)


def cause_of(error: BaseException) -> str:
    """Return the first line of a file system's error, or its type."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _is_object_store(files: Any) -> bool:
    protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
    return bool(protocols & OBJECT_STORES)
