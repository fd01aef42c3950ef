"""From files to rows: JSONL with a line number for every complaint; JSON, CSV, Parquet and folders through
`datasets`.

What cannot be used is refused, or skipped with a count; nothing is dropped in silence.
"""

import difflib
import importlib.resources
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lora_search.config import ColumnsConfig, DataConfig
from lora_search.errors import DataError
from lora_search.templates import Row

PACKAGED = "construction-faq"
SUFFIXES = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
SHOWN_COMPLAINTS = 3


def load_rows(config: DataConfig) -> tuple[list[Row], Counter[str]]:
    """Return the usable rows and counts ("rows read", "bad rows skipped"). Raises DataError with file,
    line, remedy."""
    path = _find(config.path)
    rows: list[Row] = []
    complaints: list[str] = []
    records = _jsonl(path) if path.suffix == ".jsonl" else _through_datasets(path)
    num_records = 0
    for source, record in records:
        num_records += 1
        row = _row(record, config.columns, source)
        if isinstance(row, Row):
            rows.append(row)
        else:
            complaints.append(row)
    if num_records == 0:
        raise DataError(
            f"data.path: {path.name} is empty. Give a file with one question and answer per line."
        )
    if complaints and (config.on_bad_row == "refuse" or not rows):
        shown = "\n  ".join(complaints[:SHOWN_COMPLAINTS])
        raise DataError(
            f"data.path: {len(complaints)} of {num_records} rows cannot be used:\n  {shown}\n"
            "Mend them, or leave such rows out with data.on_bad_row=skip."
        )
    return rows, Counter({"rows read": num_records, "bad rows skipped": len(complaints)})


def _find(path_text: str) -> Path:
    if path_text == PACKAGED:
        try:
            folder = importlib.resources.files("zaragoza_construction_faq")
        except ModuleNotFoundError:
            message = f"data.path: {PACKAGED} needs its package. Run: pip install zaragoza-construction-faq"
            raise DataError(message) from None
        return Path(str(folder / "data" / "faq-en-alpaca.jsonl"))
    path = Path(path_text).expanduser()
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "Give the path of a JSONL file."
        raise DataError(f"data.path: {path} does not exist. {hint}")
    if path.is_file() and path.suffix not in {".jsonl", *SUFFIXES}:
        known = ", ".join((".jsonl", *SUFFIXES))
        raise DataError(
            f"data.path: {path.name} has an unknown ending {path.suffix!r}; known are {known} and folders."
        )
    return path


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (source, parsed line or the complaint as an exception)."""
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        source = f"line {number} of {path.name}"
        try:
            yield source, json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield source, ValueError(f"is not UTF-8 (byte {error.start}). Convert the file: iconv -t UTF-8")
        except json.JSONDecodeError as error:
            yield source, ValueError(f"is not JSON ({error.msg} at column {error.colno})")


def _through_datasets(path: Path) -> Iterator[tuple[str, object]]:
    import tempfile

    import datasets

    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            table = _folder(path)
            for index in range(len(table)):
                yield f"row {index + 1} of {path.name}", table[index]
            return
        with tempfile.TemporaryDirectory() as cache:
            kind = SUFFIXES[path.suffix]
            table = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache)
            for index in range(len(table)):
                yield f"row {index + 1} of {path.name}", table[index]
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise DataError(f"data.path: {path.name} cannot be read: {str(cause).splitlines()[0]}") from None


def _folder(path: Path) -> "datasets.Dataset":  # type: ignore[name-defined]  # noqa: F821 (imported lazily)
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        message = (
            f"data.path: {path} is not a folder saved by datasets' save_to_disk. Give the file inside it."
        )
        raise DataError(message) from None
    if isinstance(saved, datasets.DatasetDict):
        return saved["train"] if "train" in saved else next(iter(saved.values()))
    return saved


def _row(record: object, columns: ColumnsConfig, source: str) -> Row | str:
    """Return the row, or what is wrong with it."""
    if isinstance(record, ValueError):
        return f"{source} {record}"
    if not isinstance(record, dict):
        return f"{source} is a {type(record).__name__}, not an object with keys"
    texts = {}
    for part, column in (("instruction", columns.instruction), ("response", columns.response)):
        if column not in record:
            keys = ", ".join(map(str, record))
            other = next(
                (str(key) for key in record if key not in (columns.instruction, columns.context)), "NAME"
            )
            return (
                f'{source} has no "{column}" (keys: {keys}). Rename it, or set data.columns.{part}={other}.'
            )
        if not isinstance(record[column], str):
            return f'{source}: "{column}" is {type(record[column]).__name__}, not text'
        if not record[column].strip():
            return f'{source}: "{column}" is empty'
        texts[part] = record[column].strip()
    context = record.get(columns.context) if columns.context else None
    if context is not None and not isinstance(context, str):
        return f'{source}: "{columns.context}" is {type(context).__name__}, not text'
    return Row(texts["instruction"], (context or "").strip(), texts["response"], source)
