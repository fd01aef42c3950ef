"""Data sets of the `datasets` library: folders of save_to_disk, the hub and its cache, files behind URLs.

A hub data set is read at one commit, which the study records. Without a network the library's cache is used.
A missing, gated or broken data set is one DataError.
"""

import contextlib
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from lora_search.errors import DataError
from lora_search.reading.rows import Record, numbered
from lora_search.settings.data_schema import DataConfig
from lora_search.settings.secrets import redact

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SECONDS = 5.0  # the library itself retries for a minute if no name server answers
BATCH = 1000


def library() -> Any:
    """Return the library, silenced: it draws progress bars and logs errors that we report. Slow to import."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets


def is_hub_id(text: str) -> bool:
    return HUB_ID.fullmatch(text) is not None and not text.startswith(".")


def is_saved(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def load_saved(folder: Path, key: str) -> Mapping[str, Any]:
    """Return split -> table of a folder that save_to_disk wrote; "" for a data set without splits."""
    datasets = library()
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition(" Detail:")[0].rstrip(". ")
        message = f"{key}: {folder} cannot be read: {reason}. Save it again with save_to_disk."
        raise DataError(message) from None
    return saved if isinstance(saved, datasets.DatasetDict) else {"": saved}


def load_hub(path: str, config: DataConfig, key: str, revision: str | None) -> tuple[Mapping[str, Any], str]:
    """Return split -> table of a hub data set, and its commit; offline, from the cache."""
    datasets = library()
    try:
        if hub_answers(datasets.config.HF_ENDPOINT):
            found = datasets.load_dataset(path, name=config.subset, revision=revision)
        else:
            found = _from_cache(path, config.subset, revision, datasets)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise DataError(_not_there(path, key, str(error))) from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        said = redact(str(error)).strip().splitlines() or [type(error).__name__]
        remedy = (
            "Check the name, data.subset and data.revision; without a network only what is cached is there."
        )
        raise DataError(
            f"{key}: the hub data set {path} cannot be read: {said[0].rstrip('.')}. {remedy}"
        ) from None
    first = next(iter(found.values()))
    return found, Path(first.cache_files[0]["filename"]).parent.name if first.cache_files else ""


def _from_cache(path: str, subset: str | None, revision: str | None, datasets: Any) -> Any:
    from datasets.packaged_modules.cache.cache import Cache

    pinned = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision)
    version = {"version": "0.0.0", "hash": revision} if pinned else {"version": "auto", "hash": "auto"}
    name = path.partition("/")[2]
    try:
        subset = subset or ("default" if pinned else None)
        builder = Cache(dataset_name=name, repo_id=path, config_name=subset, **version)
        builder.download_and_prepare()
        return builder.as_dataset()
    except (ValueError, OSError) as error:
        raise FileNotFoundError(
            f"it is not in the cache, and {datasets.config.HF_ENDPOINT} does not answer"
        ) from error


def hub_answers(endpoint: str, *, if_distrusted: bool = False) -> bool:
    """Return whether the hub answers at all, whatever it says; ``if_distrusted`` where its certificate is not
    trusted."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (urllib.error.URLError, OSError) as error:
        return if_distrusted and isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


def _not_there(path: str, key: str, said: str) -> str:
    if "gated" in said:
        remedy = (
            f"Ask for access at https://huggingface.co/datasets/{path}, then log in with `hf auth login`."
        )
        return f"{key}: the hub data set {path} is gated. {remedy}"
    if "Revision" in said:
        return f"data.revision: {said}"
    reason = (
        "it is not in the cache, and the hub does not answer"
        if "cache" in said
        else "the hub has no such data"
    )
    return f"{key}: {path} is neither a file or folder here nor a readable hub data set: {reason}."


def table_records(table: Any, name: str) -> Iterator[Record]:
    """Yield the rows of a table, a thousand at a time."""
    batches = (batch.to_pylist() for batch in table.data.to_reader(max_chunksize=BATCH))
    yield from numbered(chain.from_iterable(batches) if table._indices is None else table.to_list(), name)


def fetch(url: str, key: str) -> Path:
    """Return the local copy of a file behind a URL, downloaded once into the library's cache."""
    datasets = library()
    try:
        with contextlib.redirect_stderr(None):
            path = Path(datasets.DownloadManager().download(url))
    except ImportError as error:
        remedy = "Install what it names, or download the file yourself."
        raise DataError(f"{key}: {redact(url)} cannot be downloaded: {error}. {remedy}") from None
    except Exception as error:  # noqa: BLE001 (each of fsspec's services raises errors of its own)
        said = f"{_cause(error, url)}. Check the address, or download the file yourself"
        raise DataError(f"{key}: {redact(url)} cannot be downloaded: {said}.") from None
    _hide_address(path.with_name(f"{path.name}.json"))
    return path


def _hide_address(note: Path) -> None:
    """Take the password out of the address that the library keeps beside a download."""
    with contextlib.suppress(OSError):
        kept = note.read_text(encoding="utf-8")
        if redact(kept) != kept:
            note.write_text(redact(kept), encoding="utf-8")


def _cause(error: BaseException, url: str) -> str:
    """Return the first line of the first error in the chain that says more than the address."""
    said = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    if said in ("", url):
        return _cause(error.__cause__, url) if error.__cause__ else type(error).__name__
    return redact(said)
