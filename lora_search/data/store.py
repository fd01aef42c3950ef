"""Tokenized rows in Arrow files: written in batches, memory-mapped for reading, kept for later starts.

One folder per (rows, tokenizer, template, split), which all workers of a host and all starts share. Memory
contains the lengths and the rows being read; a row becomes tuples of tokens only on access.
"""

import contextlib
import hashlib
import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_search.data.rows import Example, Item, Pair
from lora_search.files.atomic import write_file
from lora_search.settings.schema import DataConfig, SweepConfig, as_dict

META = "meta.json"
FORMAT = "2"  # of the files, and of the rendering of rows: increase it when either changes
KEPT = 16  # folders; the least recently used are deleted first
ROWS_PER_BATCH = 1000
R = TypeVar("R")
Numbers = np.ndarray[Any, Any]
FREE = ("max_length", "max_length_percentile", "max_length_choices")  # rows are cut when read


def stored_folder() -> Path:
    """Return the folder of tokenized rows: in LORA_SEARCH_CACHE, or ~/.cache/lora_search."""
    return Path(os.environ.get("LORA_SEARCH_CACHE", "~/.cache/lora_search")).expanduser() / "data"


def store_key(config: SweepConfig, rows_digest: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the folder's name; it depends on everything that could change a token or its place."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    data = {key: value for key, value in as_dict(config.data).items() if key not in FREE}
    parts = [
        FORMAT, rows_digest, config.seed, data, as_dict(config.template), config.train.loss_on, vocabulary,
        tokenizer.chat_template, sorted(map(str, tokenizer.all_special_tokens)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def rows_key(data: DataConfig, rows_digest: str) -> str:
    """Return a key of the rows as they are read, independent of the tokenizer."""
    settings = {key: value for key, value in as_dict(data).items() if key not in FREE}
    return hashlib.sha256(json.dumps([FORMAT, rows_digest, settings]).encode()).hexdigest()[:32]


def knows_rows(data: DataConfig, rows_digest: str) -> bool:
    """Return whether these rows were read before, and were usable, with these settings."""
    key, folder = rows_key(data, rows_digest), stored_folder()
    metas = (read_meta(path) for path in folder.iterdir()) if folder.is_dir() else iter(())
    return any(meta is not None and meta.get("rows") == key for meta in metas)


class StoredItems:
    """The tokenized rows of one split, before they are cut."""

    def __init__(self, path: Path) -> None:
        import datasets

        self.path = path
        self._batches = datasets.Dataset.from_file(str(path)).data.table.to_batches()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._columns: dict[int, dict[str, Any]] = {}
        self.lengths, self.num_prompts, self.times = (
            np.concatenate([np.zeros(0, np.int32), *(self._numbers(b, name) for b in self._batches)])
            for name in ("length", "num_prompt", "times")
        )
        weights = (self._numbers(batch, "weight") for batch in self._batches)
        self.weights: Numbers = np.concatenate([np.zeros(0), *weights])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @staticmethod
    def _numbers(batch: Any, name: str) -> Numbers:
        column: Numbers = batch.column(name).to_numpy(zero_copy_only=False)
        return column

    def token_ids(self) -> Iterator[Numbers]:
        """Yield the tokens of all rows, many rows at a time."""
        for batch in self._batches:
            column = batch.column("input_ids")
            yield column.flatten().to_numpy()

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return number, index - int(self._starts[number])

    def _list(self, number: int, name: str, row: int) -> tuple[int, ...]:
        """Return a list of numbers; the two arrays of its column are memory-mapped."""
        columns = self._columns.setdefault(number, {})
        if name not in columns:
            column = self._batches[number].column(name)
            columns[name] = (column.values.to_numpy(), column.offsets.to_numpy())
        values, offsets = columns[name]
        return tuple(values[offsets[row] : offsets[row + 1]].tolist())

    def example(self, index: int) -> Example:
        number, row = self._place(index)
        masked = _pairs(self._list(number, "masked", row))
        ids, weight = self._list(number, "input_ids", row), float(self.weights[index])
        return Example(ids, int(self.num_prompts[index]), masked, weight)

    def item(self, index: int) -> Item:
        number, row = self._place(index)
        source, prompt, completion = (
            self._batches[number].column(name)[row].as_py() for name in ("source", "prompt", "completion")
        )
        pair = Pair(prompt, completion, _pairs(self._list(number, "masked_text", row)))
        return Item(source, pair, self.example(index), int(self.times[index]))


def _pairs(flat: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def write_items(items: Iterable[Item], path: Path) -> None:
    """Write items to an Arrow file, batch by batch."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    numbers = datasets.List(datasets.Value("int32"))
    text, number = datasets.Value("string"), datasets.Value("int32")
    features = datasets.Features(
        source=text, prompt=text, completion=text, masked_text=numbers, input_ids=numbers, masked=numbers,
        length=number, num_prompt=number, times=number, weight=datasets.Value("float64"),
    )  # fmt: skip
    left = iter(items)
    with ArrowWriter(features=features, path=str(path)) as writer:
        while batch := list(islice(left, ROWS_PER_BATCH)):
            writer.write_table(_table(batch))
        writer.finalize()


def _table(batch: Sequence[Item]) -> Any:
    """Return the Arrow table of a batch; the library builds lists of numbers ten times as slowly."""
    import pyarrow as pa

    masked_text = [[bound for part in item.pair.masked for bound in part] for item in batch]
    masked = [[bound for part in item.example.masked for bound in part] for item in batch]
    numbers = {
        "length": [len(item.example.input_ids) for item in batch],
        "num_prompt": [item.example.num_prompt_tokens for item in batch],
        "times": [item.times for item in batch],
    }
    return pa.table({
        "source": [item.source for item in batch],
        "prompt": [item.pair.prompt for item in batch],
        "completion": [item.pair.completion for item in batch],
        "masked_text": _lists(masked_text),
        "input_ids": _lists([item.example.input_ids for item in batch]),
        "masked": _lists(masked),
        **{name: np.array(values, np.int32) for name, values in numbers.items()},
        "weight": np.array([item.example.weight for item in batch], np.float64),
    })  # fmt: skip


def _lists(rows: Sequence[Sequence[int]]) -> Any:
    import pyarrow as pa

    starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.fromiter(chain.from_iterable(rows), np.int32, int(starts[-1]))
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(values))


class LazyRows(Sequence[R]):
    """Rows that are created on access, by `_row`."""

    @abstractmethod
    def _row(self, index: int) -> R: ...

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[R, ...]: ...
    def __getitem__(self, index: int | slice) -> R | tuple[R, ...]:
        places = range(len(self))[index]
        return tuple(map(self._row, places)) if isinstance(places, range) else self._row(places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class StoredRows(LazyRows[R]):
    """Rows of a split in order; ``make`` creates each."""

    def __init__(self, items: StoredItems, indices: Numbers, make: Callable[[int], R], most: int) -> None:
        self.items, self.indices, self.make = items, indices, make
        self.whole_lengths: Numbers = items.lengths[indices]
        self.digest_file = items.path.with_name(f"{items.path.stem}-{most}.sha256")  # of the rows so cut
        self.lengths: Numbers = np.minimum(
            self.whole_lengths, most
        )  # at most: rows may be cut at the end of a turn

    def __len__(self) -> int:
        return len(self.indices)

    def _row(self, index: int) -> R:
        return self.make(int(self.indices[index]))


class JoinedRows(LazyRows[Example]):
    """The rows of several splits, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])
        self.lengths: Numbers = np.concatenate([lengths_of(part) for part in parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _row(self, index: int) -> Example:
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.parts[number][index - int(self.starts[number])]


def keep_within_limit(folder: Path) -> None:
    """Mark the folder as used, and delete the least recently used ones."""
    os.utime(folder)
    others = [path for path in folder.parent.iterdir() if (path / META).is_file()]
    for old in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)  # processes that read it keep their open files


def write_meta(folder: Path, meta: Mapping[str, object]) -> None:
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the counts from when the folder was written; None if it has none."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta


def lengths_of(rows: Sequence[Example]) -> Numbers:
    """Return the number of tokens of each row, without creating the rows if the lengths are known."""
    if isinstance(rows, StoredRows | JoinedRows):
        return rows.lengths
    return np.array([len(row.input_ids) for row in rows], dtype=np.int64)


def longest_rows(rows: Sequence[Example], count: int) -> list[Example]:
    """Return the longest rows, longest first; of equal lengths the first ones."""
    order = np.argsort(-lengths_of(rows), kind="stable")[:count]
    return [rows[int(i)] for i in order]


def lengths_before_cuts(rows: Sequence[Example]) -> Numbers:
    """Return the number of tokens of each row before cutting."""
    return rows.whole_lengths if isinstance(rows, StoredRows) else lengths_of(rows)


def token_counts(rows: Sequence[Example]) -> list[int]:
    """Return the tokens of each row as it is trained on."""
    counts: list[int] = lengths_of(rows).tolist()
    if isinstance(rows, StoredRows):
        for i in np.flatnonzero(rows.whole_lengths > rows.lengths):  # cut, some at the end of a turn
            counts[i] = len(rows[int(i)].input_ids)
    return counts


def used_tokens(splits: Iterable[Sequence[Example]]) -> Numbers:
    """Return the ids that occur in rows; in stored ones, before they were cut."""
    used = np.zeros(0, bool)
    for rows in splits:
        stored = isinstance(rows, StoredRows)
        for ids in rows.items.token_ids() if stored else (np.array(row.input_ids) for row in rows):  # type: ignore[attr-defined]
            if len(ids) and ids.max() >= len(used):
                used = np.concatenate([used, np.zeros(ids.max() + 1 - len(used), bool)])
            used[ids] = True
    numbers: Numbers = np.flatnonzero(used)
    return numbers


def kept_digest(rows: Sequence[Example], make: Callable[[], str]) -> str:
    """Return the digest of rows; of stored ones it is made once."""
    if not isinstance(rows, StoredRows):
        return make()
    with contextlib.suppress(OSError):
        return rows.digest_file.read_text()
    digest = make()
    with contextlib.suppress(OSError):
        write_file(rows.digest_file, digest.encode())
    return digest
