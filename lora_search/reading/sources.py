"""Finds the sources that data.path and the like name: files, folders, saved and hub data sets, URLs, each
with its split.

The user's own splits are kept: files or splits named train, validation and test are used as such.
"""

import difflib
import hashlib
import importlib.resources
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora_search.errors import DataError
from lora_search.reading.encodings import DataFile, digest_of
from lora_search.reading.files import SUFFIXES, check_file, read_file, suffix_of
from lora_search.reading.hub import fetch, is_hub_id, is_saved, load_hub, load_saved, table_records
from lora_search.reading.rows import Record
from lora_search.settings.data_schema import PACKAGED, DataConfig
from lora_search.settings.rules import require
from lora_search.settings.secrets import redact

SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "eval": "validation", "test": "test", "testing": "test",
}  # fmt: skip


IN_FOLDERS = tuple(suffix for suffix in SUFFIXES if ".txt" not in suffix)  # .txt files there are often notes


@dataclass(frozen=True)
class Named:
    """A path as the settings name it: by which key, with the split and weight of its rows."""

    path: str
    key: str
    config: DataConfig
    split: str = ""  # "": its own splits
    weight: float = 1.0


@dataclass(frozen=True)
class Source:
    """A file or table of rows: its name, split and digest."""

    key: str  # the setting that named it
    name: str
    digest: str
    records: Callable[[], Iterator[Record]]
    split: str = ""  # train, validation or test if the user split the rows; "": to be split here
    weight: float = 1.0


@dataclass
class Found:
    """All sources that the settings name."""

    sources: list[Source] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    commits: Mapping[str, str] = field(default_factory=dict)  # hub data set -> the commit to read
    revisions: dict[str, str] = field(default_factory=dict)  # and the one that was read
    heeded: set[str] = field(default_factory=set)  # settings that apply to some source

    @property
    def digest(self) -> str:
        """Return a digest of all sources."""
        parts = [f"{s.key} {s.name} {s.split} {s.weight} {s.digest}" for s in self.sources]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def find_sources(config: DataConfig, commits: Mapping[str, str] | None = None) -> Found:
    """Return every source, checked but not read. DataError: a missing file, or one that its name belies."""
    found = Found(commits=commits or {})
    for path, weight in zip(config.paths, config.weights or [1.0] * len(config.paths), strict=True):
        found.sources += _find(Named(path, "data.path", config, weight=weight), found)
    for split in ("validation", "test"):
        for path in config.own(split):
            found.sources += _find(Named(path, f"data.{split}_path", config, split), found)
    if not any(source.split in ("", "train") for source in found.sources):
        raise DataError(f"data.path: {redact(config.name)} has no rows to train on, only other splits.")
    _check_heeded(config, found)
    return found


def _check_heeded(config: DataConfig, found: Found) -> None:
    """Raise ConfigError for a setting that applies to none of the sources."""
    found.heeded |= {"subset"} if any(s.name.endswith(".xlsx") for s in found.sources) else set()
    for name, what in (
        ("subset", "hub data sets and Excel files"),
        ("split", "hub and saved data sets, and folders"),
        ("revision", "hub data sets"),
    ):
        value = getattr(config, name)
        rule = f"is for {what}, and data.path={redact(config.name)} is none"
        require(value is None or name in found.heeded, f"data.{name}", value, rule, "Leave it out")


def _find(named: Named, found: Found) -> list[Source]:
    """Return the sources at one path; without a split of its own, one for each of its splits."""
    path, key = named.path, named.key
    if "://" in path:
        name = redact(path).partition("?")[0].rpartition("/")[2]
        return [_file(fetch(path, key), named, named.split, name)]
    local = _local(path, key)
    if local is None:
        tables, commit = load_hub(path, named.config, key, found.commits.get(path, named.config.revision))
        found.revisions[path] = commit
        found.heeded |= {"subset", "revision"}
        return _tables(tables, path, commit, named, found)
    try:
        if local.is_dir() and is_saved(local):
            digest = _digest([p for p in sorted(local.rglob("*")) if p.is_file()])
            return _tables(load_saved(local, key), local.name, digest, named, found)
        if local.is_dir():
            return _folder(local, named, found)
        return [_file(local, named, named.split, local.name)]
    except OSError as error:
        raise DataError(f"{key}: {local} cannot be read: {error.strerror or error}.") from None


def _local(text: str, key: str) -> Path | None:
    """Return the file or folder; None for a hub id."""
    if text == PACKAGED:
        try:
            folder = importlib.resources.files("zaragoza_construction_faq")
        except ModuleNotFoundError:
            message = f"{key}: {PACKAGED} needs its package. Run: pip install zaragoza-construction-faq"
            raise DataError(message) from None
        return Path(str(folder / "data" / "faq-en-alpaca.jsonl"))
    path = Path(text).expanduser()
    try:
        exists = path.exists()
    except OSError as error:  # a folder above it may not be entered, or the name is too long
        raise DataError(f"{key}: {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # a null character
        raise DataError(f"{key}: {text!r} cannot be a path: {error}.") from None
    if exists:
        return path
    if is_hub_id(text) and not suffix_of(path.name) and not path.parent.exists():
        return None
    siblings = [p.name for p in path.parent.iterdir() if p.name != path.name] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3)
    hint = (
        f"Did you mean {', '.join(near)}?" if near else "Give a local file or folder, or a hub id (org/name)."
    )
    raise DataError(f"{key}: {path} does not exist. {hint}")


def _file(path: Path, named: Named, split: str, name: str) -> Source:
    ending = suffix_of(name)
    if path.is_file() and not ending:
        known, shown = ", ".join(SUFFIXES), "".join(Path(name).suffixes)
        what = f"{name} has an unknown ending {shown!r}; known are {known}"
        raise DataError(f"{named.key}: {what}. Save it as one of them.")
    file = DataFile(path, name, named.key, ending)
    checked = check_file(file, named.config.encoding)
    records = partial(read_file, file, checked.encoding, named.config.subset)
    return Source(named.key, name, checked.digest, records, split, named.weight)


def _folder(folder: Path, named: Named, found: Found) -> list[Source]:
    files = sorted(p for p in folder.iterdir() if suffix_of(p.name) in IN_FOLDERS and p.is_file())
    if not files:
        known = ", ".join(IN_FOLDERS)
        raise DataError(
            f"{named.key}: {folder} has no data: no {known} file, and no data set saved by save_to_disk."
        )
    split = named.split
    of_split = {file: split or split_of(file.name) for file in files}
    training = {_set_of(file.name) for file in files if of_split[file] == "train"}
    if not split and (named.config.split is not None or len(training) > 1):
        found.heeded.add("split")
        sets = dict.fromkeys(_set_of(file.name) for file in files)
        chosen = _chosen(sets, folder.name, named)
        found.counts["files of other splits left unread"] += sum(_set_of(f.name) not in chosen for f in files)
        files = [file for file in files if _set_of(file.name) in chosen]
        of_split = {file: chosen[_set_of(file.name)] for file in files}
    if not split and "train" in of_split.values():
        left_out = [file for file in files if not of_split[file]]
        found.counts["files left unread beside train"] += len(left_out)
        files = [file for file in files if of_split[file]]
    return [_file(file, named, of_split[file], file.name) for file in files]


def _set_of(name: str) -> str:
    """Return a file's name without shard and endings: train_sft of train_sft-00000-of-00004.parquet."""
    return re.sub(r"[-_.]?\d.*$", "", name.partition(".")[0])


def split_of(name: str) -> str:
    """Return the split that the name of a file or table gives: train, validation, test, or ""."""
    first = re.split(r"[^a-z]+", name.lower(), maxsplit=1)[0]
    return SPLITS.get(first, "")


def _tables(tables: Mapping[str, Any], name: str, digest: str, named: Named, found: Found) -> list[Source]:
    """Return the splits of a data set to use: the requested one, or those with common names."""
    found.heeded.add("split")
    chosen = _chosen(tables, name, named)
    found.counts["rows of other splits left unread"] += sum(
        len(t) for n, t in tables.items() if n not in chosen
    )
    sources = []
    for table, split in chosen.items():
        own = f"{name}/{table}" if table else name
        own_digest = hashlib.sha256(f"{digest}\n{table}".encode()).hexdigest()
        records = partial(table_records, tables[table], own)
        sources.append(Source(named.key, own, own_digest, records, split, named.weight))
    return sources


def _chosen(tables: Mapping[str, Any], name: str, named: Named) -> dict[str, str]:
    """Return table -> split of the tables to use. DataError if that cannot be told from their names."""
    wanted, split = named.config.split, named.split
    if wanted is not None and named.key == "data.path":
        if wanted not in tables:
            there = ", ".join(tables) if list(tables) != [""] else "none"
            raise DataError(f"data.split: {name} has no split {wanted!r}. There are: {there}.")
        others = _beside(wanted, tables)
        return {wanted: "train" if others else "", **others}
    if split:
        kinds = {table: split_of(table) or split for table in tables}
        return {table: kind for table, kind in kinds.items() if kind == split} or dict.fromkeys(tables, split)
    if len(tables) == 1:
        return {table: split_of(table) for table in tables}
    usual = [table for table in tables if SPLITS.get(table) == "train"]
    training = usual or [table for table in tables if split_of(table) == "train"]
    if len(training) == 1:
        return {training[0]: "train", **_beside(training[0], tables)}
    what = f"several splits to train on: {', '.join(training)}" if training else "no split called train"
    remedy = f"Choose one, e.g. data.split={(training or list(tables))[0]}"
    there = "" if training else f" There are: {', '.join(tables)}."
    raise DataError(f"data.split: {name} has {what}.{there} {remedy}.")


def _beside(training: str, tables: Mapping[str, Any]) -> dict[str, str]:
    """Return the validation and test tables that belong to a training table: test_sft to train_sft,
    validation to train, or else validation_matched and validation_mismatched to train."""
    ending = _ending(training)
    beside: dict[str, str] = {}
    for kind in ("validation", "test"):
        of_kind = [table for table in tables if split_of(table) == kind and table != training]
        same = [table for table in of_kind if _ending(table) == ending]
        beside |= dict.fromkeys(same or (of_kind if split_of(training) and not ending else []), kind)
    return beside


def _ending(table: str) -> str:
    """Return what follows the split in a table's name: "_sft" of train_sft."""
    return re.sub(r"^[a-z]+", "", table.lower()) if split_of(table) else ""


def _digest(files: Sequence[Path]) -> str:
    listed = "".join(f"{path.name}\n{digest_of(path)}\n" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()
