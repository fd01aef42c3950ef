"""What files give, and what a person is told whose file cannot be used."""

import json
from pathlib import Path

import datasets
import pytest

from lora_search.data.reading import load_rows
from lora_search.data.rows import Row
from lora_search.errors import DataError
from lora_search.settings.schema import ColumnsConfig, DataConfig

GOOD = {"instruction": "Question?", "context": "", "response": "Answer."}
ROWS = [{**GOOD, "instruction": f"Question {i}?", "context": "Ctx" if i % 2 else ""} for i in range(12)]


def write_lines(path: Path, *lines: str) -> DataConfig:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return DataConfig(path=str(path))


def write_bytes(path: Path, content: bytes) -> DataConfig:
    path.write_bytes(content)
    return DataConfig(path=str(path))


def texts(path: Path) -> list[tuple[str, str, str]]:
    rows, _ = load_rows(DataConfig(path=str(path)))
    return [(row.instruction, row.context, row.response) for row in rows]


def refusal(config: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(config)
    return str(caught.value)


def test_the_packaged_pairs_are_all_there() -> None:
    columns = ColumnsConfig(context="input", response="output")

    rows, counts = load_rows(DataConfig(path="construction-faq", columns=columns))

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

    rows, _ = load_rows(DataConfig(path=str(tmp_path)))

    assert [row.source for row in rows] == ["part-1.jsonl:1", "part-2.json:1", "part-2.json:2"]


def test_the_users_own_test_file_never_joins_the_training_rows(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", json.dumps(ROWS[0]))
    write_lines(tmp_path / "test.jsonl", json.dumps(ROWS[1]))

    rows, counts = load_rows(DataConfig(path=str(tmp_path)))

    assert [row.source for row in rows] == ["train.jsonl:1"]
    assert counts["files left unread beside train"] == 1


def test_the_users_own_test_split_never_joins_the_training_rows(tmp_path: Path) -> None:
    parts = {"test": ROWS[:5], "train": ROWS[5:]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(
        tmp_path / "d"
    )

    rows, counts = load_rows(DataConfig(path=str(tmp_path / "d")))

    assert len(rows) == 7
    assert counts["rows left unread beside train"] == 5


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

    rows, counts = load_rows(
        write_bytes(tmp_path / "faq.jsonl", b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    )

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

    assert load_rows(config)[0] == [Row("What?", "Roofs", "Tiles.", "faq.jsonl:1")]


def test_a_mapped_context_that_no_row_has_is_refused(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "faq.jsonl", json.dumps(GOOD))
    config.columns = ColumnsConfig(context="abuot")

    assert "data.columns.context: no row has 'abuot' (keys: instruction, context, response)" in refusal(
        config
    )


def test_what_looks_like_an_unused_context_is_counted(tmp_path: Path) -> None:
    line = '{"instruction": "a", "input": "b", "response": "c"}'

    _, counts = load_rows(write_lines(tmp_path / "faq.jsonl", line))

    assert counts['rows whose "input" is not used (data.columns.context)'] == 1


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
        'has no "response" (keys: instruction, output). Rename it, or set data.columns.response=output.',
    ),
    (
        '{"id": "1", "question": "a", "response": "b"}',
        "missing field",
        "set data.columns.instruction=question.",
    ),
    ('{"id": 1, "tags": []}', "missing field", "set data.columns.instruction=NAME."),
    ('{"messages": [{"role": "user"}]}', "missing field", "Chats are not read: write question and answer"),
    ('{"instruction": "a", "response": "b", "response": "c"}', "repeated key", 'has "response" twice.'),
    ('{"instruction": "a", "response": {"text": "b"}}', "wrong type", "is dict, not text. Write it as one"),
    (
        '{"Instruction": "a", "id": "1", "response": "b"}',
        "missing field",
        "data.columns.instruction=Instruction.",
    ),
    (
        '{"instruction": "a", "response": null}',
        "missing field",
        'line 2 of faq.jsonl: "response" is missing or null',
    ),
    ('{"instruction": "a", "response": 7}', "wrong type", '"response" is int, not text. Put it in "quotes".'),
    ('{"instruction": ["a"], "response": "b"}', "wrong type", '"instruction" is list, not text'),
    ('{"instruction": "a", "response": "b", "context": ["c"]}', "wrong type", '"context" is list, not text'),
    ('{"instruction": "", "response": "b"}', "empty field", '"instruction" is empty'),
    ('{"instruction": "a", "response": " \\n "}', "empty field", '"response" is empty'),
    ('{"instruction": "a", "response": "\\ud800"}', "broken text", '"response" holds half a character'),
]


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

    rows, counts = load_rows(config)

    assert [row.source for row in rows] == ["faq.jsonl:1"]
    assert counts == {"rows read": 2, f"bad rows skipped ({reason})": 1}


def test_a_line_in_another_encoding_is_named(tmp_path: Path) -> None:
    lines = json.dumps(GOOD).encode() + b"\n" + '{"instruction": "é", "response": "b"}'.encode("latin-1")

    told = refusal(write_bytes(tmp_path / "faq.jsonl", lines))

    assert (
        "line 2 of faq.jsonl is not UTF-8 at byte 18. Convert the file, e.g. iconv -f LATIN1 -t UTF-8" in told
    )


def test_only_the_first_faults_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    told = refusal(write_lines(tmp_path / "faq.jsonl", json.dumps(GOOD), *["{}"] * 40))

    assert "40 of 41 rows cannot be used" in told
    assert [f"line {n} of" in told for n in (2, 3, 4, 5)] == [True, True, True, False]


def test_a_file_of_bad_rows_alone_is_refused_even_when_they_may_be_skipped(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "faq.jsonl", "{}", "{}")
    config.on_bad_row = "skip"

    assert "2 of 2 rows cannot be used" in refusal(config)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("faq.jsonl", b"", "faq.jsonl is empty"),
        ("faq.jsonl", b"\n \n", "faq.jsonl is empty"),
        ("faq.json", b"", "faq.json is empty"),
        ("faq.json", b"[]", "faq.json is empty"),
        ("faq.csv", b"instruction,response\n", "faq.csv is empty"),
        (
            "faq.jsonl",
            '{"a": 1}'.encode("utf-16"),
            "faq.jsonl is UTF-16, not UTF-8. Convert the file, e.g. iconv -f",
        ),
        (
            "faq.json",
            '[{"instruction":"é"}]'.encode("latin-1"),
            "faq.json cannot be read: it is not UTF-8. Convert",
        ),
        (
            "faq.csv",
            "instruction,response\né,b\n".encode("latin-1"),
            "faq.csv cannot be read: it is not UTF-8.",
        ),
        ("faq.json", b'[{"instruction": "a"', "faq.json cannot be read: "),
        (
            "faq.json",
            b'[{"instruction": "a", "response": 7}]',
            'row 1 of faq.json: "response" is int, not text',
        ),
        (
            "faq.json",
            b'{"data": [{"instruction": "a"}]}',
            'row 1 of faq.json has no "instruction" (keys: data)',
        ),
        (
            "faq.csv",
            b"instruction|response\na|b\n",
            'row 1 of faq.csv has no "instruction" (keys: instruction|r',
        ),
        (
            "faq.csv",
            b"instruction,response,response\na,b,c\n",
            'faq.csv has two columns "response". Rename one',
        ),
        (
            "faq.csv",
            "instruction,response\n".encode("utf-16"),
            "faq.csv is UTF-16, not UTF-8. Convert the file",
        ),
        ("faq.json", b"\xff\xfe\x00\x00[\x00\x00\x00", "faq.json is UTF-32, not UTF-8. Convert the file"),
        ("faq.jsonl", '{"instruction": "a"}'.encode("utf-16-le"), "faq.jsonl is UTF-16LE, not UTF-8."),
        ("faq.jsonl", '{"instruction": "a"}'.encode("utf-16-be"), "faq.jsonl is UTF-16BE, not UTF-8."),
        (
            "faq.csv",
            b"instruction,response\na,b,c\nd,e,f\n",
            "faq.csv has rows with more fields than its header",
        ),
        (
            "faq.csv",
            b"instruction,response\na,b\nd,e,f\n",
            "Expected 2 fields in line 3, saw 3. Put text that holds",
        ),
        ("faq.csv", b"instruction,response\na\n", 'row 1 of faq.csv: "response" is'),
        ("faq.parquet", b"hello", "faq.parquet cannot be read: "),
        ("faq.txt", b"hello", "unknown ending '.txt'; known are .jsonl, .json, .csv, .parquet and folders"),
    ],
)
def test_a_bad_file_is_refused_with_a_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    assert message in refusal(write_bytes(tmp_path / name, content))


def test_a_missing_file_is_answered_with_near_names(tmp_path: Path) -> None:
    write_lines(tmp_path / "faq.jsonl", json.dumps(GOOD))

    assert "does not exist. Did you mean faq.jsonl?" in refusal(DataConfig(path=str(tmp_path / "faqs.jsonl")))
    assert "does not exist. Give the path of a local file" in refusal(DataConfig(path="nobody/nothing"))


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")

    assert "holds no data: no .jsonl, .json, .csv, .parquet file" in refusal(DataConfig(path=str(tmp_path)))


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
