"""Turns rows into examples: removes duplicates, splits, renders the text that the model sees, tokenizes.

The split depends only on (seed, question): a row stays in its split when others are added, and rows with the
same question are in the same split. Costs two tokenizations of the data, once per sweep.
"""

import contextlib
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_search.data.control_tokens import check_control_text
from lora_search.data.rows import Example, Pair, Splits
from lora_search.data.splitting import (
    cap,
    remove_leakage,
    require_both_sides,
    side_key,
    split,
    without_duplicates,
    words,
)
from lora_search.data.store import (
    Numbers,
    StoredItems,
    StoredRows,
    keep_within_limit,
    read_meta,
    rows_key,
    store_key,
    stored_folder,
    write_items,
    write_meta,
)
from lora_search.data.templates import Renderer
from lora_search.data.tokens import (
    choose_max_length,
    count_cuts,
    cut,
    cut_pair,
    describe_lengths,
    fitting_rows,
    tokenize_rows,
)
from lora_search.files.atomic import explained_writing, write_file
from lora_search.reading.rows import Loaded, Row
from lora_search.reading.text import is_indented, normal_answer
from lora_search.settings.schema import SweepConfig
from lora_search.settings.train_schema import ALL_TOKENS
from lora_search.watching import Watch, unwatched

SPLITS = ("train", "validation", "test")
WRITTEN = ".written.json"  # beside the rows as the model sees them: of which content they are


def prepare(
    config: SweepConfig, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, watch: Watch = unwatched
) -> Splits:
    """Return the splits, tokenized once and later read from the store."""
    digest = loaded.digest or _rows_digest(loaded.rows)
    stored = stored_folder() / store_key(config, digest, tokenizer)
    found = _stored(stored)
    if found is None:
        with explained_writing(stored):
            _store(config, loaded, tokenizer, stored, watch)
        found = _stored(stored)
        assert found is not None
    keep_within_limit(stored)
    return _cut(config, *found, tokenizer)


def _stored(folder: Path) -> tuple[dict[str, StoredItems], dict[str, Any]] | None:
    """Return the content of the folder; delete an incomplete folder and return None."""
    with contextlib.suppress(OSError, ValueError):  # Arrow's errors among them
        if (meta := read_meta(folder)) is not None:
            return {name: StoredItems(folder / f"{name}.arrow") for name in SPLITS}, meta
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _store(
    config: SweepConfig, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, target: Path, watch: Watch
) -> None:
    """Clean, split, render and tokenize into the folder. Two workers may do so at once."""
    loaded = loaded.reread() if loaded.reread is not None else loaded
    rows, counts = loaded.rows, loaded.counts.copy()
    unique = without_duplicates(watch(rows, "comparing rows", len(rows)))
    counts["exact duplicates removed"] = len(rows) - len(unique)
    counts["further answers kept beside their question"] = len(unique) - len(set(map(side_key, unique)))
    parts = split(unique, config.data, config.seed)
    if any(row.split for row in unique):
        remove_leakage(parts, config.data, counts)
    kept = cap(parts, config.data, counts)
    require_both_sides(kept, config)
    check_control_text(config, list(chain.from_iterable(kept.values())), tokenizer, counts)
    renderer = Renderer(config.template, tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    gc.freeze()  # the rows stay: going through them for garbage again and again took 14 % of the time
    try:
        for name, members in kept.items():
            skip = config.data.on_bad_row == "skip"
            needed = name != "test"
            items = tokenize_rows(members, renderer, config.train.loss_on, skip=skip, is_needed=needed)
            write_items(watch(items, f"tokenizing {name} rows", len(members)), fresh / f"{name}.arrow")
        counts += renderer.counts
        write_meta(
            fresh,
            {"data_hash": _hash(unique), "counts": +counts, "rows": rows_key(config.data, loaded.digest)},
        )
        with contextlib.suppress(OSError):  # another worker was first
            fresh.replace(target)
    finally:
        gc.unfreeze()
        shutil.rmtree(fresh, ignore_errors=True)


def _cut(
    config: SweepConfig,
    items: Mapping[str, StoredItems],
    meta: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> Splits:
    """Return the splits, cut to the length that the settings give."""
    counts, lengths = Counter[str](meta["counts"]), items["train"].lengths
    whole = ("train",) if config.train.loss_on == ALL_TOKENS else ()
    max_length = choose_max_length(config.data, lengths, tokenizer)
    numbers = fitting_rows(items, max_length, config.data, counts)
    for name in SPLITS:
        count_cuts(name, items[name], numbers[name], max_length, counts)
    return Splits(
        **{name: _examples(items[name], numbers[name], max_length, name in whole) for name in SPLITS},
        max_length=max_length,
        data_hash=meta["data_hash"],
        counts=+counts | {name: len(numbers[name]) for name in SPLITS} | describe_lengths(lengths),
        pairs={name: _pairs(items[name], numbers[name], max_length, tokenizer) for name in SPLITS},
    )


def _examples(items: StoredItems, numbers: Numbers, max_length: int, is_whole: bool) -> StoredRows[Example]:
    """Return the rows, cut to length; with the loss on every token but the first if ``is_whole``."""

    def example(number: int) -> Example:
        row = cut(items.example(number), max_length)
        return replace(row, num_prompt_tokens=1, masked=()) if is_whole else row

    return StoredRows(items, numbers, example, max_length)


def _pairs(
    items: StoredItems, numbers: Numbers, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> StoredRows[Pair]:
    return StoredRows(
        items, numbers, lambda number: cut_pair(items.item(number), max_length, tokenizer), max_length
    )


def _rows_digest(rows: Sequence[Row]) -> str:
    """Return a digest of rows that are not from a file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def _hash(rows: Sequence[Row]) -> str:
    """Hash the sorted words of all rows, the lines of indented answers, and the user's own splits."""
    keys = sorted((*words(row), *_further(row)) for row in rows)
    digest = hashlib.sha256()
    for number, key in enumerate(keys):
        digest.update(f"{', ' if number else '['}{json.dumps(key)}".encode())
    digest.update(b"]")
    return digest.hexdigest()


def _further(row: Row) -> tuple[str, ...]:
    lines = (normal_answer(row.response),) if is_indented(row.response) else ()
    return (*lines, f"split {row.split}", f"group {row.group}") if row.split or row.group else lines


def pairs_text(pairs: Sequence[Pair]) -> str:
    """Return one line of JSON per pair."""
    return "".join(map(_line, pairs))


def _line(pair: Pair) -> str:
    """Return prompt and completion as JSON, and the characters of the completion without loss."""
    masked = {"masked": pair.masked} if pair.masked else {}
    texts = {"prompt": pair.prompt, "completion": pair.completion, **masked}
    return f"{json.dumps(texts, ensure_ascii=False)}\n"


def write_pairs(
    splits: Splits, folder: Path, watch: Watch = unwatched, content: Mapping[str, str] | None = None
) -> None:
    """Write the text that the model sees to ``folder``/{train,validation,test}.jsonl, unless rows of that
    ``content`` are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / WRITTEN
    if content and _written_there(marker) == [content[f"content.{name}"] for name in SPLITS]:
        return
    marker.unlink(missing_ok=True)
    for name, members in splits.pairs.items():
        fresh = folder / f"{name}.{os.getpid()}.new"  # each worker writes the same
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, watch(members, f"writing {name} rows", len(members))))
        fresh.replace(folder / f"{name}.jsonl")
    if content:
        rows = {name: [content[f"content.{name}"], *_place(folder, name)] for name in SPLITS}
        write_file(marker, json.dumps(rows).encode())


def _written_there(marker: Path) -> list[str]:
    """Return the digests of the rows that are there, if they are unchanged."""
    try:
        rows = json.loads(marker.read_text())
        return [rows[name][0] for name in SPLITS if rows[name][1:] == _place(marker.parent, name)]
    except (OSError, ValueError, LookupError):
        return []


def _place(folder: Path, name: str) -> list[int]:
    there = (folder / f"{name}.jsonl").stat()
    return [there.st_size, there.st_mtime_ns]
