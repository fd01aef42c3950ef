"""What files give, and what a person is told whose file cannot be used."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from lora_search.errors import ConfigError, DataError
from lora_search.reading.load import load_rows
from lora_search.reading.rows import Row
from lora_search.settings.schema import ColumnsConfig, DataConfig

GOOD = {"instruction": "Question?", "context": "", "response": "Answer."}
ROWS = [{**GOOD, "instruction": f"Question {i}?", "context": "Ctx" if i % 2 else ""} for i in range(12)]


def write_lines(path: Path, *lines: str) -> DataConfig:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return DataConfig(path=str(path))


def write_bytes(path: Path, content: bytes) -> DataConfig:
    path.write_bytes(content)
    return DataConfig(path=str(path))


def read(config: DataConfig) -> tuple[list[Row], Counter[str]]:
    loaded = load_rows(config)
    return loaded.rows, loaded.counts


def texts(path: Path) -> list[tuple[str, str, str]]:
    rows, _ = read(DataConfig(path=str(path)))
    return [(row.instruction, row.context, row.response) for row in rows]


def refusal(config: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(config)
    return str(caught.value)


def test_the_packaged_pairs_are_all_there() -> None:
    columns = ColumnsConfig(context="input", response="output")

    rows, counts = read(DataConfig(path="construction-faq", columns=columns))

    assert len(rows) == counts["rows read"] == 503
    assert rows[0].instruction == "What is a bygglov (building permit)?"
    assert rows[16].source == "faq-en-alpaca.jsonl:17"


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    expected = [(row["instruction"], row["context"], row["response"]) for row in ROWS]
    table = datasets.Dataset.from_list(ROWS)
    write_lines(tmp_path / "faq.jsonl", *map(json.dumps, ROWS))
    (tmp_path / "faq.json").write_text(json.dumps(ROWS))
    table.to_csv(tmp_path / "faq.CSV")
    table.to_parquet(tmp_path / "faq.parquet")
    table.save_to_disk(tmp_path / "saved")

    assert texts(tmp_path / "faq.jsonl") == expected
    assert texts(tmp_path / "faq.json") == expected
    assert texts(tmp_path / "faq.CSV") == expected
    assert texts(tmp_path / "faq.parquet") == expected
    assert texts(tmp_path / "saved") == expected


def test_a_folder_of_files_is_read_whole(tmp_path: Path) -> None:
    write_lines(tmp_path / "part-1.jsonl", json.dumps(ROWS[0]))
    (tmp_path / "part-2.json").write_text(json.dumps(ROWS[1:3]))
    (tmp_path / "notes.txt").write_text("not data")

    rows, _ = read(DataConfig(path=str(tmp_path)))

    assert [row.source for row in rows] == ["part-1.jsonl:1", "part-2.json:1", "part-2.json:2"]


def test_files_named_after_splits_are_the_users_own_splits(tmp_path: Path) -> None:
    for name, row in zip(("train-1", "val", "test", "notes"), ROWS, strict=False):
        write_lines(tmp_path / f"{name}.jsonl", json.dumps(row))

    rows, counts = read(DataConfig(path=str(tmp_path)))

    assert {row.source: row.split for row in rows} == {
        "test.jsonl:1": "test", "train-1.jsonl:1": "train", "val.jsonl:1": "validation",
    }  # fmt: skip
    assert counts["files left unread beside train"] == 1


def test_the_splits_of_a_saved_data_set_are_the_users_own(tmp_path: Path) -> None:
    parts = {"test": ROWS[:5], "train": ROWS[5:9], "extra": ROWS[9:]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(
        tmp_path / "d"
    )

    rows, counts = read(DataConfig(path=str(tmp_path / "d")))

    assert Counter(row.split for row in rows) == {"train": 4, "test": 5}
    assert counts["rows of other splits left unread"] == 3
    assert counts["rows of the user's own test split"] == 5


def test_a_saved_data_set_without_train_asks_for_a_split(tmp_path: Path) -> None:
    parts = {"a": ROWS[:5], "b": ROWS[5:]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(
        tmp_path / "d"
    )

    assert (
        "data.split: d has no split called train. There are: a, b. Choose one, e.g. data.split=a."
        in refusal(DataConfig(path=str(tmp_path / "d")))
    )
    assert "no split 'c'. There are: a, b." in refusal(DataConfig(path=str(tmp_path / "d"), split="c"))
    assert len(read(DataConfig(path=str(tmp_path / "d"), split="b"))[0]) == 7


def shards(folder: Path, *names: str) -> str:
    """Write one file for each name; file k has k + 1 rows."""
    folder.mkdir()
    for count, name in enumerate(names, start=1):
        rows = [{"question": f"What is {name} {i}?", "answer": f"It is {i}."} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


TWO_SETS = ("train_sft-00000-of-00002", "train_sft-00001-of-00002", "test_sft", "train_gen", "notes")


def test_a_folder_with_several_sets_to_train_on_is_refused(tmp_path: Path) -> None:
    path = shards(tmp_path / "d", *TWO_SETS)

    with pytest.raises(DataError, match="several splits to train on: train_gen, train_sft. Choose one"):
        load_rows(DataConfig(path=path))


@pytest.mark.parametrize(
    ("split", "expected", "unread"),
    [("train_sft", {"train": 3, "test": 3}, 2), ("train_gen", {"": 4}, 4), ("notes", {"": 5}, 4)],
)
def test_a_set_of_a_folder_is_chosen_by_name(
    tmp_path: Path, split: str, expected: dict[str, int], unread: int
) -> None:
    loaded = load_rows(DataConfig(path=shards(tmp_path / "d", *TWO_SETS), split=split))

    assert Counter(row.split for row in loaded.rows) == expected
    assert loaded.counts["files of other splits left unread"] == unread


def test_shards_of_one_set_are_one_set(tmp_path: Path) -> None:
    loaded = load_rows(
        DataConfig(path=shards(tmp_path / "d", "train-00000-of-00002", "train-00001-of-00002"))
    )

    assert Counter(row.split for row in loaded.rows) == {"train": 3}


def saved(path: Path, *names: str) -> str:
    """Write a data set whose splits have 1, 2, 3, ... rows."""
    parts = {name: datasets.Dataset.from_list(ROWS[: i + 1]) for i, name in enumerate(names)}
    datasets.DatasetDict(parts).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize(
    ("names", "data", "expected"),
    [
        (("train_sft", "test_sft"), {}, {"train": 1, "test": 2}),
        (("train", "val", "test"), {}, {"train": 1, "validation": 2, "test": 3}),
        (("train", "dev"), {}, {"train": 1, "validation": 2}),
        (("train", "eval", "train_small"), {}, {"train": 1, "validation": 2}),
        (("train_sft", "test_sft", "train_gen", "test_gen"), {"split": "train_gen"}, {"train": 3, "test": 4}),
        (("all", "validation"), {"split": "all"}, {"train": 1, "validation": 2}),
        (("train", "test_hard", "test"), {}, {"train": 1, "test": 3}),
        (("train_sft", "test_gen"), {}, {"train": 1}),
        (("train_sft",), {}, {"train": 1}),
    ],
)
def test_splits_are_found_by_the_names_that_hubs_give_them(
    tmp_path: Path, names: tuple[str, ...], data: dict[str, str], expected: dict[str, int]
) -> None:
    loaded = load_rows(DataConfig(path=saved(tmp_path / "d", *names), **data))

    assert Counter(row.split for row in loaded.rows) == expected
    used = [note.partition(": ")[0] for note in loaded.notes]
    assert len(used) == len(expected)
    assert all(f"({split})" in note for split, note in zip(expected, used, strict=True))


def test_several_validation_splits_beside_a_plain_train_are_all_used(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", "train", "validation_matched", "validation_mismatched", "test_hard", "test")

    loaded = load_rows(DataConfig(path=path))

    assert Counter(row.split for row in loaded.rows) == {"train": 1, "validation": 2 + 3, "test": 5}


@pytest.mark.parametrize("others", [(), ("validation",)])
def test_several_splits_to_train_on_are_refused_with_a_choice(
    tmp_path: Path, others: tuple[str, ...]
) -> None:
    config = DataConfig(path=saved(tmp_path / "d", "train_sft", "train_gen", *others))

    assert refusal(config) == (
        "data.split: d has several splits to train on: train_sft, train_gen. "
        "Choose one, e.g. data.split=train_sft."
    )


def test_files_of_the_users_own_splits_are_read_beside_the_path(tmp_path: Path) -> None:
    for name, row in zip(("mine", "judge", "final"), ROWS, strict=False):
        write_lines(tmp_path / f"{name}.jsonl", json.dumps(row))
    config = DataConfig(
        path=str(tmp_path / "mine.jsonl"),
        validation_path=[str(tmp_path / "judge.jsonl")],
        test_path=str(tmp_path / "final.jsonl"),
    )

    rows, _ = read(config)

    assert [(row.source, row.split) for row in rows] == [
        ("mine.jsonl:1", ""), ("judge.jsonl:1", "validation"), ("final.jsonl:1", "test"),
    ]  # fmt: skip


def test_a_missing_file_of_a_split_is_refused_under_its_key(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "faq.jsonl", json.dumps(GOOD))
    config.validation_path = str(tmp_path / "faqs.jsonl")

    assert refusal(config).startswith("data.validation_path: ")


def test_several_files_are_read_each_in_its_own_layout_and_weight(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", '{"q": "A?", "a": "a"}')
    (tmp_path / "b.csv").write_text("prompt,completion\nB?,b\n")
    config = DataConfig(path=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")], weights=[1, 2.5])

    loaded = load_rows(config)

    assert loaded.rows == [
        Row("A?", "", "a", "a.jsonl:1"), Row("B?", "", "b", "b.csv:2", weight=2.5),
    ]  # fmt: skip
    assert loaded.notes == (
        "a.jsonl: question and answer: q, a",
        "b.csv: prompt_completion: prompt, completion",
    )


def test_rows_know_their_group(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "faq.jsonl", *(json.dumps({**GOOD, "doc": d}) for d in ("a", "b")))
    config.group_by = "doc"

    assert [row.group for row in read(config)[0]] == ["a", "b"]


@pytest.mark.parametrize("name", ["faq.jsonl", "faq.csv"])
def test_rows_know_how_much_they_count(tmp_path: Path, name: str) -> None:
    rows = {
        "jsonl": '{"q": "A?", "a": "a", "w": 0.5}\n{"q": "B?", "a": "b", "w": 1}\n',
        "csv": "q,a,w\nA?,a,0.5\nB?,b,1\n",
    }
    (tmp_path / name).write_text(rows[name.partition(".")[2]])
    config = DataConfig(path=str(tmp_path / name), columns=ColumnsConfig(weight="w"))

    loaded = load_rows(config)

    assert [row.loss_weight for row in loaded.rows] == [0.5, 1.0]
    assert loaded.counts["rows with a loss weight of their own"] == 1


@pytest.mark.wrong_input
@pytest.mark.parametrize("value", [None, 0, -1, 1001, True, "much", [1], float("nan"), float("inf")])
def test_a_weight_that_is_no_number_above_0_is_refused_with_its_line(tmp_path: Path, value: object) -> None:
    config = write_lines(
        tmp_path / "faq.jsonl", json.dumps({**GOOD, "w": 2}), json.dumps({**GOOD, "w": value})
    )
    config.columns = ColumnsConfig(weight="w")

    message = refusal(config)

    assert 'line 2 of faq.jsonl: "w" is ' in message
    assert "not a number from 0.000001 to 1000 (data.columns.weight)" in message


def test_the_column_of_the_groups_is_no_text_that_nothing_uses(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text(json.dumps({"question": "Why?", "answer": "So.", "document": "law.pdf"}) + "\n")

    (row,) = load_rows(DataConfig(path=str(path), group_by="document")).rows

    assert (row.group, row.context) == ("law.pdf", "")


def test_a_row_without_a_group_is_refused(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "faq.jsonl", json.dumps({**GOOD, "doc": "a"}), json.dumps(GOOD))
    config.group_by = "doc"

    assert 'line 2 of faq.jsonl has no "doc" (data.group_by)' in refusal(config)


def test_nothing_is_left_in_the_home_folder_or_on_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = sorted(cache.glob("*"))
    (tmp_path / "faq.json").write_text(json.dumps(ROWS))

    load_rows(DataConfig(path=str(tmp_path / "faq.json")))
    refusal(write_bytes(tmp_path / "broken.parquet", b"hello"))

    assert sorted(cache.glob("*")) == before
    assert capfd.readouterr() == ("", "")


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    line = json.dumps({**GOOD, "response": "é"}, ensure_ascii=False).encode()

    rows, counts = read(write_bytes(tmp_path / "faq.jsonl", b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line))

    assert rows == [Row("Question?", "", "é", "faq.jsonl:1"), Row("Question?", "", "é", "faq.jsonl:4")]
    assert counts["rows read"] == 2


def test_csv_cells_stay_the_text_that_they_are(tmp_path: Path) -> None:
    content = b'instruction,response\nNA,null\n007,12\n"a, b","c\nd"\n'

    load_rows(write_bytes(tmp_path / "faq.csv", content))

    assert texts(tmp_path / "faq.csv") == [("NA", "", "null"), ("007", "", "12"), ("a, b", "", "c\nd")]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_file_may_be_separated_as_spreadsheets_do(tmp_path: Path, separator: str) -> None:
    lines = [["instruction", "response"], ['"a, b; c"', "d"]]
    content = "\r\n".join(separator.join(cells) for cells in lines)

    load_rows(write_bytes(tmp_path / "faq.csv", b"\xef\xbb\xbf" + content.encode()))

    assert texts(tmp_path / "faq.csv") == [("a, b; c", "", "d")]


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "faq.jsonl", '{"q": "What?", "about": "Roofs", "a": "Tiles."}')
    config.columns = ColumnsConfig(instruction="q", context="about", response="a")

    assert read(config)[0] == [Row("What?", "Roofs", "Tiles.", "faq.jsonl:1")]


def test_a_mapped_context_that_no_row_has_is_refused(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "faq.jsonl", json.dumps(GOOD))
    config.columns = ColumnsConfig(context="abuot")

    assert "data.columns.context: no row has 'abuot' (keys: instruction, context, response)" in refusal(
        config
    )


BAD_LINES = [
    (
        '{"instruction": "a", "response": "b"',
        "not JSON",
        "line 2 of faq.jsonl is not JSON (Expecting ',' delimiter",
    ),
    ("[[[", "not JSON", "name the file faq.json if it is one list"),
    ("[" * 100_000, "not JSON", "is not JSON that can be read"),
    (f'{{"instruction": {"9" * 5000}}}', "not JSON", "is not JSON that can be read"),
    ("[1, 2]", "not an object", 'like {"instruction": ..., "response": ...}. Name the file .json if it is'),
    ('"text"', "not an object", "is a str, not an object"),
    (
        '{"instruction": "a", "output": "b"}',
        "missing field",
        'has no "response" (keys: instruction, output). Rename "output" to "response" as the other rows',
    ),
    (
        '{"id": "1", "question": "a", "response": "b"}',
        "missing field",
        'Rename "question" to "instruction" as the other rows have it.',
    ),
    (
        '{"id": 1, "tags": []}',
        "missing field",
        'has no "instruction" and no "response" (keys: id, tags). Write it as',
    ),
    (
        '{"messages": [{"role": "user"}]}',
        "missing field",
        'no "instruction" and no "response" (keys: messages)',
    ),
    ('{"instruction": "a", "response": "b", "response": "c"}', "repeated key", 'has "response" twice.'),
    ('{"instruction": "a", "response": {"text": "b"}}', "wrong type", "is dict, not text. Write it as one"),
    (
        '{"Instruction": "a", "id": "1", "response": "b"}',
        "missing field",
        'Rename "Instruction" to "instruction" as the other rows',
    ),
    (
        '{"instruction": "a", "response": null}',
        "missing field",
        'line 2 of faq.jsonl: "response" is missing or null',
    ),
    ('{"instruction": "a", "response": 7}', "wrong type", '"response" is int, not text. Put it in "quotes".'),
    ('{"instruction": ["a"], "response": "b"}', "wrong type", "message 1 is str, not an object"),
    ('{"instruction": "a", "response": "b", "context": ["c"]}', "wrong type", '"context" is list, not text'),
    ('{"instruction": "", "response": "b"}', "empty field", '"instruction" is empty'),
    ('{"instruction": "a", "response": " \\n "}', "empty field", '"response" is empty'),
    ('{"instruction": "a", "response": "\\ud800"}', "broken text", '"response" has half a character'),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_refused_with_its_place_and_remedy(
    tmp_path: Path, line: str, reason: str, message: str
) -> None:
    told = refusal(write_lines(tmp_path / "faq.jsonl", json.dumps(GOOD), line))

    assert told.startswith("data.path: 1 of 2 rows cannot be used:\n  line 2 of faq.jsonl")
    assert message in told
    assert told.endswith("data.on_bad_row=skip.")


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_may_be_skipped_and_is_counted_by_reason(
    tmp_path: Path, line: str, reason: str, message: str
) -> None:
    config = write_lines(tmp_path / "faq.jsonl", json.dumps(GOOD), line)
    config.on_bad_row = "skip"

    rows, counts = read(config)

    assert [row.source for row in rows] == ["faq.jsonl:1"]
    assert counts == {"rows read": 2, f"bad rows skipped ({reason})": 1}


def test_a_broken_line_among_good_ones_is_named(tmp_path: Path) -> None:
    good = json.dumps({**GOOD, "response": "é"}, ensure_ascii=False).encode()
    lines = b"\n".join([good] * 9 + ['{"instruction": "é", "response": "b"}'.encode("latin-1")])

    told = refusal(write_bytes(tmp_path / "faq.jsonl", lines))

    assert "line 10 of faq.jsonl is not UTF-8 at byte 18. Fix the line: the others are." in told


def test_only_the_first_faults_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    told = refusal(write_lines(tmp_path / "faq.jsonl", json.dumps(GOOD), *["{}"] * 40))

    assert "40 of 41 rows cannot be used" in told
    assert [f"line {n} of" in told for n in (2, 3, 4, 5)] == [True, True, True, False]


def test_a_file_of_bad_rows_alone_is_refused_even_when_they_may_be_skipped(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "faq.jsonl", "{}", "{}")
    config.on_bad_row = "skip"

    assert "2 of 2 rows cannot be used" in refusal(config)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("faq.jsonl", b"", "faq.jsonl is empty"),
        ("faq.jsonl", b"\n \n", "faq.jsonl is empty"),
        ("faq.json", b"", "faq.json is empty"),
        ("faq.json", b"[]", "faq.json is empty"),
        ("faq.csv", b"instruction,response\n", "faq.csv is empty"),
        ("faq.json", b'[{"instruction": "a"', "faq.json cannot be read: "),
        (
            "faq.json",
            b'[{"instruction": "a", "response": 7}]',
            'row 1 of faq.json: "response" is int, not text',
        ),
        (
            "faq.json",
            b'{"data": [{"instruction": "a"}]}',
            "faq.json has no answer that could be recognised (columns: instruction).",
        ),
        (
            "faq.csv",
            b"a/b\nx/y\n",
            "faq.csv has no question and no answer that could be recognised (columns: a/b)",
        ),
        (
            "faq.csv",
            b"instruction,response,response\na,b,c\n",
            'faq.csv has two columns "response". Rename one',
        ),
        ("faq.csv", "instruction,response\n".encode("utf-16"), "faq.csv is empty"),
        ("faq.json", b"\xff\xfe\x00\x00[\x00\x00\x00", "faq.json cannot be read: Expecting value at line 1"),
        (
            "faq.csv",
            b"instruction,response\na,b\nd,e,f\n",
            "line 3 of faq.csv has 3 fields, its header 2. Put text",
        ),
        ("faq.csv", b"instruction,response\na\n", 'line 2 of faq.csv: "response" is missing'),
        ("faq.parquet", b"hello", "faq.parquet is not a Parquet file. Check that it is complete."),
        ("faq.doc", b"hello", "unknown ending '.doc'; known are .jsonl, .ndjson, .json, .csv"),
        ("faq.txt", b"hello", "faq.txt has no tab in its first line. Write question and answer with a tab"),
    ],
)
def test_a_bad_file_is_refused_with_a_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    assert message in refusal(write_bytes(tmp_path / name, content))


@pytest.mark.wrong_input
@pytest.mark.parametrize("name", ["subset", "split", "revision"])
def test_a_setting_that_no_source_heeds_is_refused(tmp_path: Path, name: str) -> None:
    config = replace(write_lines(tmp_path / "faq.jsonl", json.dumps(GOOD)), **{name: "main"})

    with pytest.raises(ConfigError, match=rf"data\.{name}: is for .*, got 'main'. Leave it out"):
        load_rows(config)


def test_a_missing_file_is_answered_with_near_names(tmp_path: Path) -> None:
    write_lines(tmp_path / "faq.jsonl", json.dumps(GOOD))

    assert "does not exist. Did you mean faq.jsonl?" in refusal(DataConfig(path=str(tmp_path / "faqs.jsonl")))
    assert "does not exist. Give a local file or folder, or a hub id" in refusal(
        DataConfig(path="no/such/file")
    )


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")

    assert "has no data: no .jsonl, .ndjson, .json, .csv" in refusal(DataConfig(path=str(tmp_path)))


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"instruction": [], "response": []}).to_parquet(tmp_path / "faq.parquet")

    assert "faq.parquet is empty" in refusal(DataConfig(path=str(tmp_path / "faq.parquet")))


def test_a_saved_folder_with_a_file_missing_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()

    assert "Save it again with save_to_disk" in refusal(DataConfig(path=str(tmp_path / "saved")))


def test_a_broken_saved_folder_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{}")

    assert "saved cannot be read" in refusal(DataConfig(path=str(tmp_path / "saved")))
