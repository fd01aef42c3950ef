"""What was tokenized once is read from then on, whatever is asked for and by whom."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lora_search.data.digest import data_content
from lora_search.data.preparation import prepare, write_pairs
from lora_search.data.rows import Splits
from lora_search.data.store import (
    knows_rows,
    lengths_of,
    longest_rows,
    stored_folder,
    token_counts,
    used_tokens,
)
from lora_search.errors import DataError
from lora_search.model.tiny import CHATML, make_tiny_tokenizer
from lora_search.reading.load import load_rows
from lora_search.settings.schema import ColumnsConfig, DataConfig, SweepConfig, TemplateConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))


def write(path: Path, num_rows: int = 1500) -> str:
    rows = [{"q": f"Question {i}?", "a": f"Answer {i} " * (1 + i % 5)} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def start(path: str, seed: int = 0, **data: object) -> Splits:
    config = SweepConfig(data=DataConfig(path=path, **data), seed=seed)  # type: ignore[arg-type]
    return prepare(config, load_rows(config.data, is_known=knows_rows), make_tiny_tokenizer())


def folders() -> int:
    return len(list(stored_folder().iterdir()))


def test_a_second_start_gives_the_same_without_reading_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "faq.jsonl")

    first = start(path)

    config = DataConfig(path=path)
    assert load_rows(config, is_known=knows_rows).rows == []
    assert start(path) == first
    assert len(first.train) > 1000  # more than one batch of the file
    assert folders() == 1


def test_another_length_cuts_the_same_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "faq.jsonl")
    whole, short = start(path, max_length_percentile=100), start(path, max_length=64)

    assert folders() == 1
    assert short.train != whole.train
    assert all(a.input_ids == b.input_ids[:64] for a, b in zip(short.train, whole.train, strict=True))


@pytest.mark.parametrize("change", ["rows", "seed", "fraction", "template", "tokenizer"])
def test_whatever_changes_a_token_or_its_place_is_tokenized_anew(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "faq.jsonl", 300)
    start(path)
    config, tokenizer = SweepConfig(data=DataConfig(path=path)), make_tiny_tokenizer()
    if change == "rows":
        write(tmp_path / "faq.jsonl", 301)
    elif change == "seed":
        config.seed = 1
    elif change == "fraction":
        config.data.test_fraction = 0.2
    elif change == "template":
        config.template = TemplateConfig(system_prompt="Be brief.")
    else:
        tokenizer.chat_template = CHATML.replace("\n", "")

    prepare(config, load_rows(config.data, is_known=knows_rows), tokenizer)

    assert folders() == 2


def test_a_fault_in_changed_rows_is_found_although_the_old_ones_are_known(tmp_path: Path) -> None:
    path = write(tmp_path / "faq.jsonl", 300)
    start(path)
    with Path(path).open("a") as file:
        file.write("{}\n")

    with pytest.raises(DataError, match="line 301 of faq.jsonl"):
        start(path)


@pytest.mark.parametrize("name", ["meta.json", "train.arrow", "test.arrow"])
def test_a_damaged_folder_is_made_anew(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "faq.jsonl", 300)
    first = start(path)
    (folder,) = stored_folder().iterdir()
    begun = (folder / name).read_bytes()[:100]
    (folder / name).unlink()  # the first start still maps it
    (folder / name).write_bytes(begun)

    assert start(path) == first


def test_weights_show_rows_as_often_as_they_say(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", 300), str(tmp_path / "b.jsonl")]
    Path(paths[1]).write_text("".join(json.dumps({"q": f"Other {i}?", "a": "B."}) + "\n" for i in range(300)))

    splits = start(paths, weights=[2.0, 0.5])  # type: ignore[arg-type]

    others = sum("Other" in pair.prompt for pair in splits.pairs["train"])
    twice = len(splits.train) - others
    assert twice % 2 == 0
    assert twice == 2 * len({pair.prompt for pair in splits.pairs["train"] if "Question" in pair.prompt})
    assert 80 < others < 160  # half of about 240


def test_loss_weights_are_stored_and_change_the_content(tmp_path: Path) -> None:
    rows = [{"q": f"Question {i}?", "a": "A.", "w": 0.5 + i % 2} for i in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    weighted, plain = start(str(path), columns=ColumnsConfig(weight="w")), start(str(path))

    expected = [
        0.5 + int(re.search(r"Question (\d+)", pair.prompt)[1]) % 2 for pair in weighted.pairs["train"]
    ]
    assert [row.weight for row in weighted.train] == expected
    assert {*expected} == {0.5, 1.5}
    assert [row.weight for row in plain.train] == [1.0] * len(expected)
    contents = [
        data_content(s, TemplateConfig(name="inst"), None)["content.train"] for s in (weighted, plain)
    ]
    assert contents[0] != contents[1]


def test_the_longest_rows_are_found_by_their_lengths(tmp_path: Path) -> None:
    train = start(write(tmp_path / "faq.jsonl", 300)).train

    found = longest_rows(train, 3)

    assert [len(row.input_ids) for row in found] == sorted(lengths_of(train).tolist(), reverse=True)[:3]


def test_what_is_asked_of_all_rows_at_a_start_is_what_the_rows_say(tmp_path: Path) -> None:
    splits = start(write(tmp_path / "faq.jsonl"), max_length=40)
    listed = list(splits.train)

    assert token_counts(splits.train) == [len(row.input_ids) for row in listed]
    assert set(used_tokens([listed])) <= set(used_tokens([splits.train]).tolist())
    assert used_tokens([[]]).tolist() == []
    assert used_tokens([splits.test]).tolist() == sorted(
        {i for row in start(str(tmp_path / "faq.jsonl")).test for i in row.input_ids}
    )


def test_a_digest_of_stored_rows_is_that_of_the_rows_and_another_one_for_another_length(
    tmp_path: Path,
) -> None:
    tokenizer, template = make_tiny_tokenizer(), TemplateConfig()
    path = write(tmp_path / "faq.jsonl", 100)

    for max_length in (40, 64):
        splits = start(path, max_length=max_length)
        fresh = replace(splits, train=list(splits.train))
        expected = data_content(fresh, template, tokenizer)
        assert data_content(splits, template, tokenizer) == expected
        assert data_content(start(path, max_length=max_length), template, tokenizer) == expected  # as kept
    assert len(list(stored_folder().glob("*/*.sha256"))) == 6


def test_rows_for_people_are_written_once_and_again_where_somebody_touched_them(tmp_path: Path) -> None:
    splits, folder = start(write(tmp_path / "faq.jsonl", 60)), tmp_path / "data"
    content = data_content(splits, TemplateConfig(), make_tiny_tokenizer())
    write_pairs(splits, folder, content=content)
    whole, written = (folder / "train.jsonl").read_text(), (folder / "train.jsonl").stat().st_mtime_ns

    write_pairs(splits, folder, content=content)
    assert (folder / "train.jsonl").stat().st_mtime_ns == written

    (folder / "train.jsonl").write_text("mine")
    write_pairs(splits, folder, content=content)
    assert (folder / "train.jsonl").read_text() == whole
