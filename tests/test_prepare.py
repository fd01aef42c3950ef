"""What is refused before a model is loaded, and what people are told of the search."""

from pathlib import Path

import pytest

from lora_search.data.rows import Splits
from lora_search.data.tokens import LENGTH
from lora_search.errors import ConfigError, LoraSearchError
from lora_search.prepare import check_amount, check_places, describe_rows, describe_search
from lora_search.settings.composition import compose
from lora_search.settings.space import parse_space


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(
        ConfigError, match="runs_dir: must be a folder that can be written to .*Not a directory"
    ):
        check_places(compose("smoke", [f"runs_dir={tmp_path}/file"]))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///", "study.storage: must name a file, or nothing of the study is kept"),
        ("sqlite:///:memory:", "study.storage: must name a file, or nothing of the study is kept"),
        ("redis://localhost", "study.storage: must be a SQL URL of a known kind, got 'redis://localhost'"),
        (
            "postgresql+psycopg://u:secret@localhost:1/db",
            "study.storage: postgresql.*:\\*\\*\\*@.*cannot be used",
        ),
        ("sqlite:///notes.txt", "study.storage: sqlite:///notes.txt cannot be used: file is not a database"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no database at all, but long enough to be looked at as one\n" * 20)

    with pytest.raises(LoraSearchError, match=message):
        check_places(compose("smoke", [f"study.storage='{url}'"]))


def test_looking_at_a_database_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    check_places(compose("smoke", []))

    assert not Path("runs/lora_search.db").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [],
            "train.batch_size: must be at most the number of training examples, 7, got 8. Lower it, or give",
        ),
        (
            ["train.gradient_accumulation_steps=2", "train.batch_size=choice(2,4)"],
            r"train.batch_size \* train.gradient_accumulation_steps: must be at most .* 7, got 8",
        ),
        (
            ["train.evals_per_epoch=8", "train.batch_size=choice(2,4)"],
            "train.evals_per_epoch: must be at most the number of training examples, 7, got 8",
        ),
    ],
)
def test_data_too_small_for_one_step_or_one_rung_is_refused(overrides: list[str], message: str) -> None:
    config = compose("smoke", overrides)

    with pytest.raises(ConfigError, match=message):
        check_amount(config, parse_space(config), 7)


def test_a_value_that_lies_outside_its_range_is_told_of() -> None:
    config = compose("smoke", ["optim.lr=0.9"])

    first, second = describe_search(config, parse_space(config))

    assert first.startswith("searching lora.r choice(8, 16, 32), optim.lr tag(log, interval(5e-5, 5e-3)), ")
    assert second == "optim.lr=0.9 lies outside what is searched: the first trial is drawn like the others"


def test_people_are_told_how_long_their_rows_are() -> None:
    config = compose("smoke", [])
    counts = {"rows read": 9, "train": 7, f"{LENGTH} median": 40, f"{LENGTH} longest": 90}
    splits = Splits((), (), (), 64, "hash", counts)

    assert describe_rows(config, splits) == [
        "data construction-faq: 9 rows read, 7 train",
        "rows are cut at 64 tokens (data.max_length=128); before that: median 40, longest 90",
    ]
