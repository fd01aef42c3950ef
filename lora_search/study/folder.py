"""runs/<study>/: the folder that a sweep writes to, and the file in it with its owner's id."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_search.database.storage import database_file
from lora_search.errors import ConfigError
from lora_search.files.atomic import TEMPORARY, explained_writing, sync
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.study.identity import Identity, find_identity

MARKER = "study.json"  # the id of the study
RESULTS = ("trials", "data", "best", "tokenizer", "report.html")  # that a study leaves in its folder
AFTER = ("confirm", "final", "export", "samples.json")  # that later commands leave
WRITTEN = (*RESULTS, *AFTER, MARKER, "best.new", "workers", "sweep.log", "wandb")
SIDES = ("", "-wal", "-shm", "-journal")  # suffixes of the files that SQLite writes


def check_folder(study: StudyConfig, runs_dir: Path) -> None:
    """Raise ConfigError if the sweep must not write to the study's folder. Creates nothing.

    The folder must be inside runs_dir, must not collide with the database or, on a disk that ignores case,
    with another study's folder, and must contain no link out of runs_dir. The database must not be among the
    files that the sweep writes.
    """
    folder = runs_dir / study.name
    _check_inside(folder)
    _check_database(folder, study)
    _check_case(folder)
    _check_links(folder)


def _check_inside(folder: Path) -> None:
    runs = folder.parent
    rule, real = f"must be a folder inside {runs}", Path(os.path.realpath(folder))
    if str(real.parent) != os.path.realpath(runs) or (os.path.lexists(folder) and not folder.is_dir()):
        raise ConfigError(
            "study.name", folder.name, f"{rule}, and {folder} is {real}", "Choose another study.name."
        )


def _check_database(folder: Path, study: StudyConfig) -> None:
    """Raise ConfigError if the database is in the place of the study's files."""
    file = database_file(study)
    if file is None:
        return
    place, database = os.path.realpath(folder).casefold(), os.path.realpath(file).casefold()
    if place.startswith(database + os.sep):
        rule = f"must be another file than the folder {file} of runs_dir"
        raise ConfigError("study.storage", str(file), rule, "Try sqlite:///runs/lora_search.db.")
    if place in [database + side for side in SIDES]:
        rule = f"must differ from the files of the database {file}"
        raise ConfigError("study.name", study.name, rule, "Choose another study.name or study.storage.")
    inside = Path(database).relative_to(place).parts if database.startswith(place + os.sep) else ()
    if inside and inside[0] in WRITTEN:
        rule = f"must not be in {folder / inside[0]}, which the sweep writes"
        raise ConfigError("study.storage", str(file), rule, "Give a file outside the study's folder.")


def _check_case(folder: Path) -> None:
    """Raise ConfigError for a new folder whose name differs from an existing one only in case."""
    if os.path.lexists(folder):
        return
    with suppress(OSError):
        for name in os.listdir(folder.parent):
            if name.casefold() == folder.name.casefold():
                rule = f"must differ from {folder.parent / name} in more than upper and lower case"
                raise ConfigError("study.name", folder.name, rule, f"Choose {name} or another study.name.")


def _check_links(folder: Path) -> None:
    """Raise ConfigError for a link from the folder out of runs_dir: the sweep would write through it.

    wandb/ itself must not be such a link; the links inside it, to its own log, are W&B's.
    """
    runs = os.path.realpath(folder.parent)
    for parent, folders, files in os.walk(folder):
        for path in (os.path.join(parent, name) for name in (*folders, *files)):
            if os.path.islink(path) and not os.path.realpath(path).startswith(runs + os.sep):
                rule = f"must contain no link out of it, and {path} links to {os.path.realpath(path)}"
                raise ConfigError("runs_dir", str(folder.parent), rule, "Remove the link.")
        folders[:] = [name for name in folders if name != "wandb"]


def study_folder(config: SweepConfig) -> Path:
    """Return the folder that the sweep writes to; create it if missing. Raises ConfigError if it is not
    inside runs_dir."""
    folder = Path(config.runs_dir) / config.study.name
    _check_inside(folder)
    with explained_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_owned(config: StudyConfig, folder: Path) -> Identity | None:
    """Return the identity of the study that the settings name, None if it does not exist yet.

    Raises ConfigError if the sweep must not write to the folder, or if it has the results of another study.
    Creates nothing.
    """
    check_folder(config, folder.parent)
    seen = _look(folder)  # first: a study exists before its folder is marked
    identity = find_identity(config)
    _judge(folder, seen, identity)
    return identity


def check_owner(folder: Path, identity: Identity) -> None:
    """Raise ConfigError if the folder has the results of another study."""
    _judge(folder, _look(folder), identity)


@dataclass(frozen=True)
class Seen:
    """What a folder reveals about its owner."""

    has_results: bool
    is_marked: bool
    owner: str | None  # None if the marker is damaged


def _look(folder: Path) -> Seen:
    has_results = any(os.path.lexists(folder / name) for name in RESULTS)  # written after the marker
    is_marked = os.path.lexists(folder / MARKER)
    return Seen(has_results, is_marked, _owner(folder / MARKER) if is_marked else None)


def _judge(folder: Path, seen: Seen, identity: Identity | None) -> None:
    """Raise ConfigError unless the folder is the study's, or free.

    Results without a marker are an older version's: only a study of such a version may continue there.
    """
    if not seen.is_marked:
        if seen.has_results and (identity is None or not identity.is_older):
            raise _not_ours(folder, "has the results of a study that is not in study.storage", identity)
    elif seen.owner is None:
        raise _not_ours(folder, f"has a damaged {MARKER}", identity)
    elif identity is None:
        raise _not_ours(folder, "belongs to a study that is not in study.storage")
    elif seen.owner != identity.id:
        words = f"(id {seen.owner}, not {identity.id})" if identity.id else f"(id {seen.owner})"
        raise _not_ours(folder, f"belongs to another study of that name {words}")


def claim_folder(folder: Path, study_name: str, identity: Identity) -> None:
    """Mark the folder as the study's. Raises ConfigError if it is another's; the first of two wins."""
    check_owner(folder, identity)
    marker = folder / MARKER
    if marker.exists():
        return
    fresh = folder / f"{MARKER}.{os.getpid()}{TEMPORARY}"
    with explained_writing(folder):
        fresh.write_text(json.dumps({"study": study_name, "id": identity.id}), encoding="utf-8")
        sync(fresh)
        with suppress(FileExistsError):
            os.link(fresh, marker)
        fresh.unlink()
    check_owner(folder, identity)


def own_folder(config: StudyConfig, folder: Path) -> None:
    """Mark the folder, made if need be, as the study's, for a command that writes there: on another machine
    than the sweep's it is new. Raises ConfigError if it is another study's."""
    identity = find_owned(config, folder)
    if identity is not None and identity.id is not None:
        with explained_writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        claim_folder(folder, config.name, identity)


def _owner(marker: Path) -> str | None:
    """Return the id in the marker; None if it is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads(marker.read_text(encoding="utf-8"))["id"]
        return owner if isinstance(owner, str) else None
    return None


def _not_ours(folder: Path, why: str, unsure: Identity | None = None) -> ConfigError:
    """Return the error with its remedies. ``unsure``: the study that may own the folder after all."""
    rule = f"must not name another study's folder, and {folder} {why}"
    remedy = f"Choose another study.name or runs_dir, give that study's study.storage, or delete {folder}."
    if unsure is not None and unsure.id is not None:
        remedy += f' If it is this study\'s, write {{"id": "{unsure.id}"}} to {folder / MARKER}.'
    return ConfigError("study.name", folder.name, rule, remedy)
