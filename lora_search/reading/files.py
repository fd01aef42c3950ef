"""Reads one file as records, each with its place: JSON lines, JSON, CSV and the like, Excel, Parquet.

The first bytes of a file reveal its kind: one that differs from its name is refused before it is read.
"""

import csv
import json
import re
import stat
import zipfile
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lora_search.errors import DataError
from lora_search.reading.encodings import Checked, DataFile, check_text, digest_of, open_bytes, unpacked_head
from lora_search.reading.rows import Complaint, Record, numbered

TABLES = (".csv", ".tsv", ".txt")
TEXTS = (".jsonl", ".ndjson", ".json", *TABLES)
SUFFIXES = (*TEXTS, *(f"{suffix}.gz" for suffix in TEXTS), ".xlsx", ".parquet")
SEPARATORS = ",;\t|"  # of a CSV file; spreadsheets write ; in locales with a decimal comma
LARGEST_JSON = 2**31  # bytes; a .json file is read at once
LARGEST_CELL = 2**24
BATCH = 1000
KINDS = {
    b"PK\x03\x04": "a zip or Excel file", b"\x1f\x8b": "gzipped", b"PAR1": "a Parquet file",
    b"%PDF": "a PDF", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"{\\rtf": "a rich text",
    b"\x7fELF": "a program", b"GGUF": "a GGUF model", b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a SQLite database",
    b"\xd0\xcf\x11\xe0": "an old Office file", b"Rar!": "a RAR archive", b"7z\xbc\xaf": "a 7z archive",
    b"\xfd7zXZ": "packed with xz", b"BZh": "packed with bzip2", b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"<!doctype html": "a web page", b"<html": "a web page", b"version https://git-lfs": "a Git LFS pointer",
}  # fmt: skip
REMEDIES = {
    "a zip or Excel file": "Name it .xlsx if it is an Excel file, else unpack it.",
    "gzipped": "Let its name end in .gz.",
    "a Parquet file": "Let its name end in .parquet.",
    "a Git LFS pointer": "Fetch the file itself with git lfs pull.",
    "a web page": "Download the file itself: this is the page around it, or a login page.",
    "an old Office file": "Save it as .xlsx.",
    "an Arrow file": "Give the folder that save_to_disk wrote.",
}


def suffix_of(name: str) -> str:
    """Return the suffix that determines how a file is read, or ""."""
    return next(
        (suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix)), ""
    )


def check_file(file: DataFile, encoding: str) -> Checked:
    """Return digest and encoding. Raises DataError unless it is a file of the kind that its name says."""
    if not stat.S_ISREG(file.path.stat().st_mode):
        rule = "is not a regular file but a pipe, socket or device"
        raise file.error(f"{rule}. Save the rows to a file.")
    suffix, size = file.suffix, file.path.stat().st_size
    with file.path.open("rb") as unread:
        head = unread.read(64)
    _check_kind(file, suffix, head)
    if suffix in (".xlsx", ".parquet") or not head:
        return Checked(digest_of(file.path), "")
    if suffix == ".json" and size > LARGEST_JSON:
        raise file.error("is larger than 2 GiB. Write it as .jsonl, one object per line.")
    if suffix.endswith(".gz"):
        suffix = suffix.removesuffix(".gz")
        _check_kind(file, suffix, unpacked_head(file))
    return check_text(file, encoding, by_line=suffix != ".json")


def _check_kind(file: DataFile, suffix: str, head: bytes) -> None:
    """Raise DataError for a file whose first bytes contradict its name."""
    kind = next((kind for mark, kind in KINDS.items() if head.lower().startswith(mark.lower())), None)
    expected = {".xlsx": "a zip or Excel file", ".parquet": "a Parquet file"}.get(suffix)
    expected = "gzipped" if suffix.endswith(".gz") else expected
    if head and kind != expected:
        if kind is None:
            raise file.error(f"is not {_kind_of(suffix)}. Check that it is complete.")
        remedy = REMEDIES.get(kind, "Give a file of text rows, one question and answer each.")
        raise file.error(f"is {kind}, not {_kind_of(suffix)}. {remedy}")


def _kind_of(suffix: str) -> str:
    return {".xlsx": "an Excel file", ".parquet": "a Parquet file"}.get(
        suffix, "gzipped" if suffix.endswith(".gz") else f"text that a {suffix} file holds"
    )


def read_file(file: DataFile, encoding: str, sheet: str | None) -> Iterator[Record]:
    """Yield the entries of a checked file."""
    if file.path.stat().st_size == 0:
        return iter(())
    if file.kind == ".xlsx":
        return _excel(file, sheet)
    if file.kind == ".parquet":
        return _parquet(file)
    if file.kind == ".json":
        return _json(file, encoding)
    return _separated(file, encoding) if file.kind in TABLES else _json_lines(file, encoding)


def _open_text(file: DataFile, encoding: str) -> TextIOWrapper:
    """Return the text; a byte that cannot be decoded becomes a lone surrogate, which makes its row bad."""
    return TextIOWrapper(open_bytes(file), encoding=encoding, errors="surrogateescape", newline="\n")


def _json_lines(file: DataFile, encoding: str) -> Iterator[Record]:
    with _open_text(file, encoding) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"line {number} of {file.name}"
                yield Record(place, f"{file.name}:{number}", _parse(line, place, file))


def _parse(line: str, place: str, file: DataFile) -> Any:
    """Return the parsed line, or a Complaint."""
    try:
        if not line.isascii():
            line.encode()
        return json.loads(line, object_pairs_hook=_object)
    except UnicodeEncodeError as error:
        at = len(line[: error.start].encode()) + 1
        return Complaint("not UTF-8", f"{place} is not UTF-8 at byte {at}. Fix the line: the others are.")
    except json.JSONDecodeError as error:
        hint = "Write one JSON object per line"
        is_list = line.lstrip()[:1] == "["
        hint += f", or name the file {Path(file.name).stem}.json if it is one list." if is_list else "."
        return Complaint("not JSON", f"{place} is not JSON ({error.msg} at column {error.colno}). {hint}")
    except _RepeatedKeyError as error:
        return Complaint("repeated key", f"{place} has {error} twice. Keep one of them.")
    except (ValueError, RecursionError) as error:  # a huge integer, deep nesting
        return Complaint("not JSON", f"{place} is not JSON that can be read ({error}).")


class _RepeatedKeyError(Exception):
    """A key occurs twice in an object; json would silently keep the last value."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(json.dumps(name) for name in names if names.count(name) > 1))
    return content


def _json(file: DataFile, encoding: str) -> Iterator[Record]:
    """Yield the entries of the file's list, at the top or under its only key with objects; else its lines."""
    with _open_text(file, encoding) as unread:
        text = unread.read()
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            yield from _json_lines(file, encoding)
            return
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        if not text.strip():
            return
        raise file.error(f"cannot be read: {where}. Fix the JSON; is it complete?") from None
    except (_RepeatedKeyError, ValueError, RecursionError) as error:
        said = f"{error} is there twice" if isinstance(error, _RepeatedKeyError) else str(error)
        raise file.error(f"cannot be read: {said}. Fix the JSON.") from None
    rows = _rows_of(content, file) if isinstance(content, dict) else content
    yield from numbered(rows if isinstance(rows, list) else [rows], file.name)


def _rows_of(content: dict[str, Any], file: DataFile) -> list[object]:
    """Return the rows of an object: its only list of objects, its columns as in pandas, or itself."""
    parts = content.items()
    lists = {name: part for name, part in parts if isinstance(part, list) and _holds_objects(part)}
    if any("role" in part[0] for part in lists.values()) and len(content) > 1:
        return [content]  # one conversation
    if len(lists) == 1:
        return next(iter(lists.values()))
    if len(lists) > 1:
        example = f"data.path={next(iter(lists))}.json"
        raise file.error(f"has several lists of rows: {', '.join(lists)}. Write each to a file, {example}.")
    columns = list(content.values())
    if len(columns) > 1 and all(isinstance(part, list) and len(part) == len(columns[0]) for part in columns):
        return [dict(zip(content, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if len(columns) > 1 and all(
        isinstance(part, dict) and part.keys() == columns[0].keys() for part in columns
    ):
        return [{name: part[key] for name, part in parts} for key in columns[0]]
    return [content]


def _holds_objects(rows: list[object]) -> bool:
    return bool(rows) and all(isinstance(row, dict) for row in rows[:BATCH])


def _separated(file: DataFile, encoding: str) -> Iterator[Record]:
    """Yield the rows of CSV, tab-separated text and the like; cells stay text."""
    csv.field_size_limit(LARGEST_CELL)
    with TextIOWrapper(open_bytes(file), encoding=encoding, errors="surrogateescape", newline="") as text:
        first = text.readline(LARGEST_CELL)
        named = re.fullmatch(r"sep=(.)\s*", first)  # Excel writes it
        separator = named[1] if named else _separator(first, file)
        if not named:
            text.seek(0)
        rows = csv.reader(text, delimiter=separator, strict=True)
        try:
            header = next(rows, [])
            _check_header(header, file)
            start = rows.line_num
            for cells in rows:
                number, start = start + 1 + bool(named), rows.line_num
                if any(cells):
                    yield _row(header, cells, f"line {number} of {file.name}", f"{file.name}:{number}")
        except csv.Error as error:
            raise file.error(
                f"cannot be read after line {start + bool(named)}: {error}. "
                'Put text that holds separators, quotes or line breaks in "quotes", and close every quote.'
            ) from None


def _row(header: list[str], cells: list[str], place: str, source: str) -> Record:
    if len(cells) > len(header):
        rule = f"has {len(cells)} fields, its header {len(header)}"
        return Record(place, source, Complaint(
            "too many fields", f'{place} {rule}. Put text that holds separators in "quotes".'
        ))  # fmt: skip
    return Record(place, source, dict(zip_longest(header, cells)))


def _separator(header: str, file: DataFile) -> str:
    """Return the separator of the columns, by the name of the file or by its header."""
    if file.kind in (".tsv", ".txt"):
        return "\t"
    counts = {sep: len(next(csv.reader([header], delimiter=sep), [])) for sep in SEPARATORS}
    return max(counts, key=lambda sep: counts[sep])


def _check_header(header: list[str], file: DataFile) -> None:
    header[:] = [name.strip() for name in header]
    repeated = next((name for name in header if name and header.count(name) > 1), None)
    if repeated is not None:
        raise file.error(f'has two columns "{repeated}". Rename one of them.')
    if file.kind == ".txt" and len(header) < 2:
        rule = "has no tab in its first line"
        remedy = "Write question and answer with a tab between, under a first line that names both"
        raise file.error(f"{rule}. {remedy}.")


def _excel(file: DataFile, sheet: str | None) -> Iterator[Record]:
    """Yield the rows of the named sheet, or of the first."""
    import openpyxl

    try:
        book = openpyxl.load_workbook(file.path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError) as error:
        raise file.error(f"cannot be read: {error}. Save it again as .xlsx.") from None
    if sheet is not None and sheet not in book.sheetnames:
        raise DataError(
            f"data.subset: {file.name} has no sheet {sheet!r}. There are: {', '.join(book.sheetnames)}."
        )
    chosen = book[sheet] if sheet is not None else book.worksheets[0]
    rows = chosen.iter_rows(values_only=True)
    header = ["" if name is None else str(name) for name in next(rows, ())]
    _check_header(header, file)
    for number, cells in enumerate(rows, start=2):
        if any(cell is not None for cell in cells):
            content = {name: _cell(cell) for name, cell in zip(header, cells, strict=False) if name}
            yield Record(f"row {number} of {file.name}", f"{file.name}:{number}", content)
    book.close()


def _cell(value: object) -> object:
    """Return a number as text; "" for an empty cell, as in CSV."""
    if value is None:
        return ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def _parquet(file: DataFile) -> Iterator[Record]:
    """Yield the rows of a Parquet file, a thousand at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=BATCH))
            yield from numbered(chain.from_iterable(batches), file.name)
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).strip().splitlines()[0].rstrip(".")
        raise file.error(f"cannot be read: {said}. Check that it is complete.") from None
