"""From files to rows: JSONL with the line of every fault; JSON, CSV, Parquet and folders through `datasets`.

What cannot be used is refused, or skipped with a count; nothing is dropped in silence.
"""

import codecs
import csv
import difflib
import importlib.resources
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_search.data.rows import Row
from lora_search.data.text import is_blank
from lora_search.errors import DataError
from lora_search.settings.schema import ColumnsConfig, DataConfig

PACKAGED = "construction-faq"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SEPARATORS = ",;\t"  # of a CSV file; spreadsheets write ; where the comma is the decimal sign
SHOWN_COMPLAINTS = 3
CHATS = {"messages", "conversations"}
USUAL_NAMES = {  # what other data sets call the parts, for suggestions only
    "instruction": ("question", "prompt", "query", "input"),
    "context": ("input", "passage", "background", "document"),
    "response": ("output", "answer", "completion", "target", "reply"),
}


@dataclass(frozen=True)
class Complaint:
    """Why a row cannot be used: the reason is counted, the message is shown."""

    reason: str
    message: str


@dataclass(frozen=True)
class Record:
    """One entry of a file, not yet checked."""

    place: str  # "line 17 of faq.jsonl", for messages
    source: str  # "faq.jsonl:17"
    content: Any  # the parsed entry, or a Complaint


def load_rows(config: DataConfig) -> tuple[list[Row], Counter[str]]:
    """Return the usable rows, and counts of what was read and skipped. DataError: file, line, remedy."""
    path = _find(config.path)
    records, counts = _read(path, config.columns)
    if not records:
        raise DataError(
            f"data.path: {path.name} is empty. Give a file with one question and answer per line."
        )
    counts["rows read"] = len(records)
    counts += _unused_context(records, config.columns)
    checked = [_check(record, config.columns) for record in records]
    rows = [row for row in checked if isinstance(row, Row)]
    complaints = [row for row in checked if isinstance(row, Complaint)]
    if complaints and (config.on_bad_row == "refuse" or not rows):
        raise DataError(
            f"data.path: {len(complaints)} of {len(records)} rows cannot be used:\n  "
            + "\n  ".join(c.message for c in complaints[:SHOWN_COMPLAINTS])
            + ("\nMend them, or leave such rows out with data.on_bad_row=skip." if rows else "")
        )
    return rows, counts + Counter(f"bad rows skipped ({c.reason})" for c in complaints)


def _find(path_text: str) -> Path:
    if path_text == PACKAGED:
        try:
            folder = importlib.resources.files("zaragoza_construction_faq")
        except ModuleNotFoundError:
            message = f"data.path: {PACKAGED} needs its package. Run: pip install zaragoza-construction-faq"
            raise DataError(message) from None
        return Path(str(folder / "data" / "faq-en-alpaca.jsonl"))
    path = Path(path_text).expanduser()
    try:
        exists = path.exists()
    except OSError as error:  # a folder above it may not be entered, or the name is too long
        raise DataError(f"data.path: {path} cannot be read: {error.strerror}.") from None
    if not exists:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "Give the path of a local file or folder."
        raise DataError(f"data.path: {path} does not exist. {hint}")
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise DataError(
            f"data.path: {path.name} has an unknown ending {path.suffix!r}; known are {known} and folders."
        )
    return path


def _read(path: Path, columns: ColumnsConfig) -> tuple[list[Record], Counter[str]]:
    """Return the entries of a file or folder. Beside a split or file called train, others are counted."""
    try:
        if not path.is_dir():
            return list(_file(path, columns)), Counter()
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _saved_folder(path)
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        chosen = [p for p in files if p.stem.startswith("train")] or files
        records = [record for file in chosen for record in _file(file, columns)]
    except OSError as error:
        raise DataError(f"data.path: {path} cannot be read: {error.strerror or error}.") from None
    if not files:
        known = ", ".join(SUFFIXES)
        raise DataError(
            f"data.path: {path} holds no data: no {known} file, nor a data set saved by save_to_disk."
        )
    return records, Counter({"files left unread beside train": len(files) - len(chosen)})


def _file(path: Path, columns: ColumnsConfig) -> Iterator[Record]:
    encoding = _wide_encoding(path)
    if encoding is not None:
        raise DataError(f"data.path: {path.name} is {encoding}, not UTF-8. {_convert(path, encoding)}")
    if path.suffix.lower() == ".jsonl":
        return _jsonl(path)
    return _as_records(path.name, _table(path, columns))


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"line {number} of {path.name}"
                yield Record(place, f"{path.name}:{number}", _parse(line, place, path))


def _parse(line: bytes, place: str, path: Path) -> Any:
    """Return what the line says, or a Complaint."""
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        remedy = _convert(path, "LATIN1")
        return Complaint("not UTF-8", f"{place} is not UTF-8 at byte {error.start + 1}. {remedy}")
    except json.JSONDecodeError as error:
        hint = "Write one JSON object per line"
        hint += (
            f", or name the file {path.stem}.json if it is one list." if line.lstrip()[:1] == b"[" else "."
        )
        return Complaint("not JSON", f"{place} is not JSON ({error.msg} at column {error.colno}). {hint}")
    except _RepeatedKeyError as error:
        return Complaint("repeated key", f"{place} has {error} twice. Keep one of them.")
    except (ValueError, RecursionError) as error:  # a huge integer, deep nesting
        return Complaint("not JSON", f"{place} is not JSON that can be read ({error}).")


class _RepeatedKeyError(Exception):
    """JSON would keep the last value in silence."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(json.dumps(name) for name in names if names.count(name) > 1))
    return content


def _wide_encoding(path: Path) -> str | None:
    """Return UTF-16 or UTF-32 where a text file is in one of them, with or without a mark at its start."""
    if path.suffix.lower() == ".parquet":
        return None
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    blanks = [place % 2 for place, byte in enumerate(start) if byte == 0]
    if len(blanks) < len(start) // 4 or not blanks or len(set(blanks)) > 1:
        return None
    return "UTF-16LE" if blanks[0] else "UTF-16BE"


def _convert(path: Path, encoding: str) -> str:
    return f"Convert the file, e.g. iconv -f {encoding} -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}"


def _as_records(name: str, contents: Sequence[object]) -> Iterator[Record]:
    for number, content in enumerate(contents, start=1):
        yield Record(f"row {number} of {name}", f"{name}:{number}", content)


def _table(path: Path, columns: ColumnsConfig) -> list[Any]:
    """Return the rows of a JSON, CSV or Parquet file. The library's cache lives in a folder of the moment."""
    datasets = _datasets()
    if path.stat().st_size == 0:
        return []
    with tempfile.TemporaryDirectory() as cache:
        place = {"path_or_paths": str(path), "cache_dir": cache, "keep_in_memory": True}
        try:
            if path.suffix.lower() == ".csv":
                # Without these, an answer "NA" or "null" would be read as missing, and "12" as a number.
                names = [name for name in (columns.instruction, columns.context, columns.response) if name]
                as_text = dict.fromkeys(names, str)
                table = datasets.Dataset.from_csv(
                    **place, sep=_separator(path, names), keep_default_na=False, converters=as_text
                )
            elif path.suffix.lower() == ".json":
                table = datasets.Dataset.from_json(**place)
            else:
                table = datasets.Dataset.from_parquet(**place)
        except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
            empty = ("corresponds to no data", "BatchSize must be greater than 0")
            if isinstance(error, StopIteration) or any(
                words in f"{error} {error.__cause__}" for words in empty
            ):
                return []  # how the library says that there are no rows
            raise DataError(f"data.path: {path.name} cannot be read: {_cause(error, path)}") from None
    if "__index_level_0__" in table.column_names and path.suffix.lower() == ".csv":
        # pandas shifts all columns by one when the first row is longer than the header
        rule = "has rows with more fields than its header"
        raise DataError(f'data.path: {path.name} {rule}. Put text that holds commas in "quotes".')
    return list(table.to_list())


def _separator(path: Path, names: Sequence[str]) -> str:
    """Return what stands between the columns, by the header. A column that is there twice is refused."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        headers = {
            sep: next(csv.reader([line], delimiter=sep), [])
            for line in [file.readline()]
            for sep in SEPARATORS
        }
    separator = next((sep for sep, header in headers.items() if names[0] in header), ",")
    repeated = next((name for name in names if headers[separator].count(name) > 1), None)
    if repeated is not None:
        raise DataError(f'data.path: {path.name} has two columns "{repeated}". Rename one of them.')
    return separator


def _cause(error: BaseException, path: Path) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError) or "UTF-8" in str(cause):
        return f"it is not UTF-8. {_convert(path, 'LATIN1')}"
    remedies = {
        ".csv": 'Put text that holds commas, quotes or line breaks in "quotes".',
        ".json": "Mend the JSON.",
    }
    said = str(cause).strip().splitlines()[0].rstrip(".")
    return f"{said}. {remedies.get(path.suffix.lower(), 'Is it complete?')}"


def _saved_folder(path: Path) -> tuple[list[Record], Counter[str]]:
    datasets = _datasets()
    try:
        saved = datasets.load_from_disk(str(path), keep_in_memory=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition(" Detail:")[0].rstrip(". ")
        message = f"data.path: {path} cannot be read: {reason}. Save it again with save_to_disk."
        raise DataError(message) from None
    if not isinstance(saved, datasets.DatasetDict):
        return list(_as_records(path.name, saved.to_list())), Counter()
    names = [name for name in saved if name == "train"] or list(saved)
    left_out = sum(len(part) for name, part in saved.items() if name not in names)
    records = [r for name in names for r in _as_records(f"{path.name}/{name}", saved[name].to_list())]
    return records, Counter({"rows left unread beside train": left_out})


def _datasets() -> Any:
    """Return the library, quiet: it is slow to import, and draws bars and logs what we report ourselves."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets


def _check(record: Record, columns: ColumnsConfig) -> Row | Complaint:
    content, place = record.content, record.place
    if isinstance(content, Complaint):
        return content
    if not isinstance(content, dict):
        kind = type(content).__name__
        message = f'{place} is a {kind}, not an object like {{"instruction": ..., "response": ...}}.'
        if isinstance(content, list) and ".jsonl:" in record.source:
            message += " Name the file .json if it is one list."
        return Complaint("not an object", message)
    texts = {"context": ""}
    for part, column in (("instruction", columns.instruction), ("response", columns.response)):
        if column not in content:
            keys, other = ", ".join(map(str, content)), _suggest(part, content, columns)
            remedy = f"Rename it, or set data.columns.{part}={other}."
            if not CHATS.isdisjoint(content):
                remedy = "Chats are not read: write question and answer under keys of their own."
            return Complaint("missing field", f'{place} has no "{column}" (keys: {keys}). {remedy}')
        texts[part] = content[column]
    if columns.context and content.get(columns.context) is not None:
        texts["context"] = content[columns.context]
    for part, text in texts.items():
        if complaint := _complain(text, f'{place}: "{getattr(columns, part)}"', part != "context"):
            return complaint
    if is_blank(texts["context"]):
        texts["context"] = ""
    return Row(**texts, source=record.source)


def _complain(value: object, what: str, required: bool) -> Complaint | None:
    if value is None:
        return Complaint("missing field", f"{what} is missing or null.")
    if not isinstance(value, str):
        remedy = 'Put it in "quotes".' if isinstance(value, int | float) else "Write it as one text."
        return Complaint("wrong type", f"{what} is {type(value).__name__}, not text. {remedy}")
    if required and is_blank(value):
        return Complaint("empty field", f"{what} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError:
        return Complaint("broken text", f"{what} holds half a character (a lone surrogate).")
    return None


def _suggest(part: str, content: dict[str, object], columns: ColumnsConfig) -> str:
    """Return the key that most likely holds this part, or NAME."""
    taken = (columns.instruction, columns.context, columns.response)
    free = [key for key, value in content.items() if key not in taken and isinstance(value, str)]
    usual = [key for key in free if key.lower() in USUAL_NAMES[part]]
    near = difflib.get_close_matches(part, free, n=1)
    return [*usual, *near, *(free if len(free) == 1 else []), "NAME"][0]


def _unused_context(records: Sequence[Record], columns: ColumnsConfig) -> Counter[str]:
    """Refuse a context column that no row has if it was asked for; else count what looks like a context."""
    contents = [record.content for record in records if isinstance(record.content, dict)]
    if columns.context is None or not contents or any(columns.context in content for content in contents):
        return Counter()
    if columns.context != ColumnsConfig().context:
        keys = ", ".join(map(str, contents[0]))
        remedy = "Name the column, or set data.columns.context=null."
        raise DataError(f"data.columns.context: no row has {columns.context!r} (keys: {keys}). {remedy}")
    unused = [name for name in USUAL_NAMES["context"] if name not in (columns.instruction, columns.response)]
    filled = Counter(name for content in contents for name in unused if content.get(name))
    return Counter(
        {f'rows whose "{name}" is not used (data.columns.context)': n for name, n in filled.items()}
    )
