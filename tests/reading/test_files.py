"""Files as people have them: read, or refused in seconds with what they are and what to do."""

import gzip
import json
import os
import socket
import time
from pathlib import Path

import datasets
import openpyxl
import pytest

from lora_search.errors import DataError
from lora_search.reading.load import load_rows
from lora_search.settings.schema import DataConfig

ROWS = [{"question": f"Was heißt {i}?", "answer": f"Größe {i}, über „alles“."} for i in range(6)]
TEXTS = [(row["question"], row["answer"]) for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "question\tanswer\n" + "".join(f"{q}\t{a}\n" for q, a in TEXTS)


def texts(path: Path, **data: object) -> list[tuple[str, str]]:
    return [(row.instruction, row.response) for row in load_rows(DataConfig(path=str(path), **data)).rows]  # type: ignore[arg-type]


def refusal(path: Path, **data: object) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(DataConfig(path=str(path), **data))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 600
    return str(caught.value)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_excel(path: Path, rows: list[list[object]], sheet: str = "Rows") -> Path:
    book = openpyxl.Workbook()
    book.active.title = sheet
    for row in rows:
        book.active.append(row)
    book.create_sheet("Notes").append(["nothing"])
    book.save(path)
    return path


@pytest.mark.parametrize("name", ["faq.jsonl", "faq.ndjson", "faq.json", "faq.JSONL"])
def test_json_lines_are_read_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    assert texts(write(tmp_path / name, LINES.encode())) == TEXTS


@pytest.mark.parametrize("name", ["faq.tsv", "faq.txt", "faq.csv"])
def test_columns_may_be_separated_by_tabs(tmp_path: Path, name: str) -> None:
    content = TABLE.replace("Größe", '"Größe').replace(".\n", '."\n')

    assert texts(write(tmp_path / name, content.encode())) == TEXTS


@pytest.mark.parametrize(("name", "content"), [("faq.jsonl.gz", LINES), ("faq.tsv.gz", TABLE)])
def test_a_gzipped_file_is_read_as_what_is_in_it(tmp_path: Path, name: str, content: str) -> None:
    assert texts(write(tmp_path / name, gzip.compress(content.encode()))) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(("name", "content"), [("faq.jsonl", LINES), ("faq.csv", TABLE), ("faq.json", LINES)])
def test_unicode_is_read_in_all_its_encodings(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    assert texts(write(tmp_path / name, content.encode(encoding))) == TEXTS


ENCODED = [
    ("cp1252", "Was kostet das?\t500 € – „ungefähr“\n"),
    ("cp1250", "Gdzie jest łódź?\tŻółć gęślą jaźń, proszę\n"),
    ("cp1251", "Что такое разрешение на строительство?\tЭто официальный документ от города.\n"),
    ("cp932", "建築許可とは何ですか？\t自治体が発行する公式な許可です。\n"),
    ("mac_roman", "Vad är bygglov?\tFår man bygga så här?\n"),
    ("gb18030", "什么是建筑许可证？\t这是市政府的正式决定。\n"),
]  # fmt: skip


@pytest.mark.wrong_input
@pytest.mark.parametrize(("encoding", "line"), ENCODED, ids=[encoding for encoding, _ in ENCODED])
def test_another_encoding_is_named_and_the_remedy_reads_it_right(
    tmp_path: Path, encoding: str, line: str
) -> None:
    path = write(tmp_path / "faq.txt", f"question\tanswer\n{line * 4}".encode(encoding))

    told = refusal(path)

    assert f"It looks like {encoding}, with which a line reads {line.strip()[:10]!r}"[:-1] in told
    assert f"set data.encoding={encoding}" in told
    assert texts(path, encoding=encoding)[0] == tuple(line.strip().split("\t"))


def test_an_encoding_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    told = refusal(write(tmp_path / "faq.jsonl", LINES.encode()), encoding="ascii")

    assert "faq.jsonl is not ascii throughout. Set data.encoding to its encoding." in told


def test_an_excel_sheet_is_read_with_numbers_as_they_look(tmp_path: Path) -> None:
    path = write_excel(
        tmp_path / "faq.xlsx", [["question", "answer"], ["How many?", 42], [None, None], ["Why?", "So."]]
    )

    rows = load_rows(DataConfig(path=str(path))).rows

    assert [(row.instruction, row.response, row.source) for row in rows] == [
        ("How many?", "42", "faq.xlsx:2"), ("Why?", "So.", "faq.xlsx:4"),
    ]  # fmt: skip


def test_a_fault_in_an_excel_sheet_is_named_by_its_row(tmp_path: Path) -> None:
    path = write_excel(tmp_path / "faq.xlsx", [["question", "answer"], ["Why?", "So."], ["Why?", None]])

    assert 'row 3 of faq.xlsx: "answer" is empty' in refusal(path)


def test_a_sheet_is_chosen_by_its_name(tmp_path: Path) -> None:
    path = write_excel(tmp_path / "faq.xlsx", [["question", "answer"], ["Why?", "So."]], "FAQ")

    assert texts(path, subset="FAQ") == [("Why?", "So.")]
    assert "data.subset: faq.xlsx has no sheet 'Faq'. There are: FAQ, Notes." in refusal(path, subset="Faq")


@pytest.mark.parametrize(
    "content",
    [
        {"question": ["Why?", "When?"], "answer": ["So.", "Now."]},
        {"question": {"0": "Why?", "1": "When?"}, "answer": {"1": "Now.", "0": "So."}},
        {
            "version": 2,
            "rows": [{"question": "Why?", "answer": "So."}, {"question": "When?", "answer": "Now."}],
        },
    ],
)
def test_an_object_of_columns_and_a_list_inside_an_object_are_read(
    tmp_path: Path, content: dict[str, object]
) -> None:
    path = write(tmp_path / "faq.json", json.dumps(content).encode())

    assert texts(path) == [("Why?", "So."), ("When?", "Now.")]


def test_one_conversation_with_its_tools_is_one_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("a", "b")]
    path = write(tmp_path / "chat.json", json.dumps({"messages": turns, "tools": tools}).encode())

    assert texts(path) == [("Why?", "So.")]


def test_several_lists_of_rows_in_one_file_are_refused(tmp_path: Path) -> None:
    rows = [{"question": "Why?", "answer": "So."}]
    path = write(tmp_path / "faq.json", json.dumps({"train": rows, "test": rows}).encode())

    assert "faq.json has several lists of rows: train, test. Write each to a file" in refusal(path)


def test_places_in_a_table_are_lines_of_the_file(tmp_path: Path) -> None:
    content = b'sep=;\r\nquestion;answer\r\n"Why\nso?";"So."\r\nWhen?;\r\n'

    assert 'line 5 of faq.csv: "answer" is empty' in refusal(write(tmp_path / "faq.csv", content))


WRONG_KINDS = [
    (
        "faq.jsonl",
        gzip.compress(LINES.encode()),
        "is gzipped, not text that a .jsonl file holds. Let its name",
    ),
    (
        "faq.csv",
        b"PK\x03\x04rest",
        "is a zip or Excel file, not text that a .csv file holds. Name it .xlsx if",
    ),
    ("faq.jsonl", b"PAR1rest", "is a Parquet file, not text that a .jsonl"),
    ("faq.json", b"%PDF-1.7", "is a PDF, not"),
    ("faq.jsonl", b"GGUF\x03\0\0\0", "is a GGUF model, not"),
    ("faq.csv", b"\x89PNG\r\n", "is a picture, not"),
    ("faq.jsonl", b"SQLite format 3\0", "is a SQLite database, not"),
    ("faq.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not"),
    ("faq.csv", b"<!DOCTYPE html><html>", "is a web page, not"),
    ("faq.xlsx", b"\xd0\xcf\x11\xe0rest", "is an old Office file, not an Excel file. Save it as .xlsx."),
    ("faq.xlsx", b"question,answer\n", "is not an Excel file. Check that it is complete."),
    ("faq.xlsx", b"PK\x03\x04rest", "cannot be read: "),
    ("faq.parquet", b"PAR1rest", "cannot be read: "),
    ("faq.jsonl.gz", LINES.encode(), "is not gzipped. Check that it is complete."),
    ("faq.jsonl.gz", gzip.compress(LINES.encode())[:-20], "ends in the middle. Get the file again."),
    ("faq.jsonl.gz", gzip.compress(b"PK\x03\x04rest"), "is a zip or Excel file, not text"),
    ("faq.jsonl", b"\0" * 5000, "is binary, not text."),
    ("faq.jsonl", bytes(range(256)) * 20, "is binary, not text."),
    ("faq.csv", b'question,answer\na,"b\nc,d\n', "cannot be read after line 1: unexpected end of data"),
    ("faq.csv", b'question,answer\na,"b" c\n', "cannot be read after line 1: ',' expected after '\"'"),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("name", "content", "message"), WRONG_KINDS, ids=range(len(WRONG_KINDS)))
def test_a_file_of_another_kind_than_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    assert f"data.path: {name} {message}" in refusal(write(tmp_path / name, content))


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.jsonl"))
        for name in ("pipe.jsonl", "endless.jsonl", "s.jsonl"):
            assert f"{name} is not a regular file but a pipe, socket or device" in refusal(tmp_path / name)


@pytest.mark.wrong_input
@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big.csv", "big.parquet", "big.xlsx"])
def test_gigabytes_of_nothing_are_refused_in_a_moment(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**36)  # a hole: 64 GiB that take no room
    start = time.perf_counter()

    refusal(tmp_path / name)

    assert time.perf_counter() - start < 5.0


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "faq.jsonl.gz", gzip.compress(b"x" * (65 * 2**20), compresslevel=1))

    assert "faq.jsonl.gz has a line of more than 64 MiB. Write one row per line." in refusal(path)


def test_a_parquet_file_of_chats_is_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    datasets.Dataset.from_list([{"messages": turns}] * 3).to_parquet(tmp_path / "chat.parquet")

    assert texts(tmp_path / "chat.parquet") == [("Why?", "So.")] * 3
