"""runs/<study>/: where a sweep writes, and the file in it that says whose folder it is."""

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
RESULTS = ("trials", "data", "best", "tokenizer", "report.html")  # what a study leaves in its folder
WRITTEN = (*RESULTS, MARKER, "best.new", "workers", "wandb", "confirm", "final", "export")
SIDES = ("", "-wal", "-shm", "-journal")  # what SQLite writes next to a database file, by its ending


def check_folder(study: StudyConfig, runs_dir: Path) -> None:
    """Raise ConfigError where the study's folder is no place to write to. Makes nothing.

    It must be inside runs_dir, be neither the database nor another study's folder on a disk that ignores
    case, hold no link that leads out of runs_dir, and the database must not be among what is written there.
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
        leads = f"{rule}, and {folder} leads to {real}"
        raise ConfigError("study.name", folder.name, leads, "Choose another study.name.")


def _check_database(folder: Path, study: StudyConfig) -> None:
    """Refuse a database whose place the study's files need."""
    file = database_file(study)
    if file is None:
        return
    place, database = os.path.realpath(folder).casefold(), os.path.realpath(file).casefold()
    if place.startswith(database + os.sep):
        rule = f"must be another file than the folder {file} of runs_dir"
        raise ConfigError("study.storage", str(file), rule, "Try sqlite:///runs/lora_search.db.")
    if place in [database + side for side in SIDES]:
        rule = f"must be another name than a file of the database {file}"
        raise ConfigError("study.name", study.name, rule, "Choose another study.name or study.storage.")
    inside = Path(database).relative_to(place).parts if database.startswith(place + os.sep) else ()
    if inside and inside[0] in WRITTEN:
        rule = f"must not be in {folder / inside[0]}, which the sweep writes"
        raise ConfigError("study.storage", str(file), rule, "Give a file outside the study's folder.")


def _check_case(folder: Path) -> None:
    """Refuse a new folder that a disk which ignores case would take for an existing one."""
    if os.path.lexists(folder):
        return
    with suppress(OSError):
        for name in os.listdir(folder.parent):
            if name.casefold() == folder.name.casefold():
                rule = f"must differ from {folder.parent / name} by more than upper and lower case"
                raise ConfigError("study.name", folder.name, rule, f"Choose {name} or another study.name.")


def _check_links(folder: Path) -> None:
    """Refuse a link in the folder that leads out of runs_dir: the sweep would write through it.

    wandb/ itself must be no such link; what W&B links inside it, to its own log, is W&B's.
    """
    runs = os.path.realpath(folder.parent)
    for parent, folders, files in os.walk(folder):
        for path in (os.path.join(parent, name) for name in (*folders, *files)):
            if os.path.islink(path) and not os.path.realpath(path).startswith(runs + os.sep):
                rule = f"must hold no link that leads out of it, and {path} leads to {os.path.realpath(path)}"
                raise ConfigError("runs_dir", str(folder.parent), rule, "Remove the link.")
        folders[:] = [name for name in folders if name != "wandb"]


def study_folder(config: SweepConfig) -> Path:
    """Return where the sweep writes, made where it is missing. Raises ConfigError where that is not inside
    runs_dir."""
    folder = Path(config.runs_dir) / config.study.name
    _check_inside(folder)
    with explained_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_owned(config: StudyConfig, folder: Path) -> Identity | None:
    """Return the identity of the study that the settings name, None where there is none yet.

    Raises ConfigError where the folder is no place to write to or holds the results of another study. Makes
    nothing.
    """
    check_folder(config, folder.parent)
    seen = _look(folder)  # first: whoever marks the folder has made its study before
    identity = find_identity(config)
    _judge(folder, seen, identity)
    return identity


def check_owner(folder: Path, identity: Identity) -> None:
    """Raise ConfigError where the folder holds the results of another study."""
    _judge(folder, _look(folder), identity)


@dataclass(frozen=True)
class Seen:
    """What a folder shows of its owner."""

    has_results: bool
    is_marked: bool
    owner: str | None  # None where the marker is damaged


def _look(folder: Path) -> Seen:
    has_results = any(
        os.path.lexists(folder / name) for name in RESULTS
    )  # first: the marker comes before them
    is_marked = os.path.lexists(folder / MARKER)
    return Seen(has_results, is_marked, _owner(folder / MARKER) if is_marked else None)


def _judge(folder: Path, seen: Seen, identity: Identity | None) -> None:
    """Raise ConfigError unless the folder is the study's, or free.

    One without a marker is an older version's: only a study of such a version goes on in it.
    """
    if not seen.is_marked:
        if seen.has_results and (identity is None or not identity.is_older):
            raise _not_ours(folder, "holds the results of a study that is not in study.storage", identity)
    elif seen.owner is None:
        raise _not_ours(folder, f"has a damaged {MARKER}", identity)
    elif identity is None:
        raise _not_ours(folder, "belongs to a study that is not in study.storage")
    elif seen.owner != identity.id:
        words = f"(id {seen.owner}, not {identity.id})" if identity.id else f"(id {seen.owner})"
        raise _not_ours(folder, f"belongs to another study of that name {words}")


def claim_folder(folder: Path, study_name: str, identity: Identity) -> None:
    """Mark the folder as the study's. Raises ConfigError where it is another's; the first of two gets it."""
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


def _owner(marker: Path) -> str | None:
    """Return the id in the marker; None where it is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads(marker.read_text(encoding="utf-8"))["id"]
        return owner if isinstance(owner, str) else None
    return None


def _not_ours(folder: Path, why: str, unsure: Identity | None = None) -> ConfigError:
    """Return the error with its ways out. ``unsure``: the study whose folder it may be after all."""
    rule = f"must not lead into another study's folder, and {folder} {why}"
    remedy = f"Choose another study.name or runs_dir, give that study's study.storage, or delete {folder}."
    if unsure is not None and unsure.id is not None:
        remedy += f' If it is this study\'s, write {{"id": "{unsure.id}"}} to {folder / MARKER}.'
    return ConfigError("study.name", folder.name, rule, remedy)
