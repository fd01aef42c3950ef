"""A study's folder that would lead writes elsewhere, or take the place of another file, is refused first."""
# ruff: noqa: E501 (a table has long rows)

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_search.errors import ConfigError
from lora_search.settings.schema import StudyConfig
from lora_search.study.folder import check_folder, find_owned

PLACES = ["trials", "data", "best", "best.new", "workers", "tokenizer", "wandb", "report.html", "study.json",
          "trials/0", "trials/0/adapter", "best/adapter", "workers/0.log"]  # fmt: skip


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.wrong_input
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["elsewhere", "missing", "runs-of-another"])
def test_a_link_that_leads_out_of_runs_is_refused(tmp_path: Path, place: str, target: str) -> None:
    link = tmp_path / "runs" / "mine" / place
    link.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs-of-another").mkdir()
    link.symlink_to(tmp_path / target)
    before = listing(tmp_path)

    with pytest.raises(
        ConfigError, match=f"runs_dir: .* {link} links to .*{target}.* Remove the link"
    ) as error:
        find_owned(StudyConfig(name="mine", storage=f"sqlite:///{tmp_path}/x.db"), tmp_path / "runs" / "mine")

    assert error.value.exit_code == 2
    assert listing(tmp_path) == before


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("name", "storage", "message"),
    [
        ("lora_search.db", "runs/lora_search.db", "study.name: must differ from the files of the database"),
        ("Lora_Search.DB", "runs/lora_search.db", "study.name: must differ from the files"),
        ("a.db-wal", "runs/a.db", "study.name: must differ from the files"),
        ("a.db-shm", "runs/a.db", "study.name: must differ from the files"),
        ("a.db-journal", "runs/../runs/a.db", "study.name: must differ from the files"),
        ("mine", "runs/mine/best/a.db", "study.storage: must not be in .*best, which the sweep writes"),
        ("mine", "runs/mine/best.new/a.db", "study.storage: must not be in .*best.new"),
        ("mine", "runs/mine/trials/0/a.db", "study.storage: must not be in .*trials"),
        ("mine", "runs", "study.storage: must be another file than the folder .*runs of runs_dir"),
        ("mine", "runs/mine", "study.name: must differ from the files of the database"),
        ("mine", "runs/mine/study.json", "study.storage: must not be in .*study.json"),
        ("mine", "runs/mine/report.html", "study.storage: must not be in .*report.html"),
        ("OLD", "runs/a.db", "study.name: must differ from .*old in more than upper and lower case"),
        ("file", "runs/a.db", "study.name: must be a folder inside"),
        ("loop", "runs/a.db", "study.name: must be a folder inside"),
        ("out", "runs/a.db", "study.name: must be a folder inside"),
    ],
)  # fmt: skip
def test_a_study_called_like_a_file_that_is_written_is_refused(
    tmp_path: Path, name: str, storage: str, message: str
) -> None:
    runs = tmp_path / "runs"
    (runs / "old").mkdir(parents=True)
    (runs / "file").touch()
    (runs / "loop").symlink_to(runs / "loop")
    (runs / "out").symlink_to(tmp_path)
    before = listing(tmp_path)

    with pytest.raises(ConfigError, match=message) as refused:
        check_folder(StudyConfig(name=name, storage=f"sqlite:///{tmp_path}/{storage}"), runs)

    assert refused.value.exit_code == 2
    assert listing(tmp_path) == before


def own_links(folder: Path) -> None:
    (folder / "trials").mkdir()
    (folder / "best").symlink_to(folder / "trials")


def wandb_log(folder: Path) -> None:
    (folder / "wandb").mkdir()
    (folder / "wandb" / "debug-core.log").symlink_to("/no/where")


def database_beside(folder: Path) -> None:
    (folder / "other.db").touch()


@pytest.mark.parametrize("make", [own_links, wandb_log, database_beside, os.listdir])
def test_what_stays_inside_is_no_fault(tmp_path: Path, make: Callable[[Path], object]) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    make(folder)

    check_folder(StudyConfig(name="mine", storage=f"sqlite:///{folder}/other.db"), folder.parent)
