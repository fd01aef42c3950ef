"""From rows to examples: duplicates out, a split that every row keeps, text as the model sees it, tokens.

The split depends on (seed, question) only: a row stays where it is when others are added, and rows that share
a question never stand on both sides. Costs two tokenizations of the data, once per sweep.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_search.data.control_tokens import check_control_text
from lora_search.data.rows import Pair, Splits
from lora_search.data.splitting import (
    cap,
    remove_leakage,
    require_both_sides,
    split,
    without_duplicates,
    words,
)
from lora_search.data.templates import Renderer
from lora_search.data.tokens import (
    choose_max_length,
    describe_lengths,
    leave_out_long_prompts,
    tokenize_rows,
    truncate,
)
from lora_search.reading.rows import Loaded, Row
from lora_search.reading.text import is_indented, normal_answer, question_key
from lora_search.settings.schema import SweepConfig


def prepare(
    config: SweepConfig,
    loaded: Loaded,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None = None,
) -> Splits:
    """Clean, split, render, tokenize; write the pairs to ``folder`` where one is given."""
    rows, counts = loaded.rows, loaded.counts.copy()
    unique = without_duplicates(rows)
    counts["exact duplicates removed"] = len(rows) - len(unique)
    counts["further answers kept beside their question"] = len(unique) - len(
        {question_key(r.question) for r in unique}
    )
    parts = split(unique, config.data, config.seed)
    if any(row.split for row in unique):
        remove_leakage(parts, config.data, counts)
    kept = cap(parts, config.data, counts)
    require_both_sides(kept, config)
    check_control_text(config, [row for part in kept.values() for row in part], tokenizer, counts)
    renderer = Renderer(config.template, tokenizer)
    items = {name: tokenize_rows(members, renderer, config.train.loss_on) for name, members in kept.items()}
    counts += renderer.counts
    max_length = choose_max_length(config.data, [item.example for item in items["train"]], tokenizer)
    fitting = leave_out_long_prompts(items, max_length, config.data, counts)
    cut = {name: truncate(name, members, max_length, tokenizer, counts) for name, members in fitting.items()}
    splits = Splits(
        **{name: tuple(item.example for item in members) for name, members in cut.items()},
        max_length=max_length,
        data_hash=_hash(unique),
        counts={key: count for key, count in counts.items() if count}
        | {name: len(members) for name, members in cut.items()}
        | describe_lengths(items["train"]),
        pairs={name: tuple(item.pair for item in members) for name, members in cut.items()},
    )
    if folder is not None:
        write_pairs(splits, folder)
    return splits


def _hash(rows: Sequence[Row]) -> str:
    """Hash the words of every row in order, the lines of answers that are indented, the user's own splits."""
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
    """Return one line of JSON for each pair."""
    return "".join(f"{json.dumps(_written(pair), ensure_ascii=False)}\n" for pair in pairs)


def _written(pair: Pair) -> dict[str, object]:
    """Return prompt and completion, and which characters of the completion bear no loss."""
    texts: dict[str, object] = {"prompt": pair.prompt, "completion": pair.completion}
    return {**texts, "masked": pair.masked} if pair.masked else texts


def write_pairs(splits: Splits, folder: Path) -> None:
    """Write the text that the model sees to ``folder``/{train,validation,test}.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in splits.pairs.items():
        fresh = folder / f"{name}.{os.getpid()}.new"  # each worker writes the same
        fresh.write_text(pairs_text(members), encoding="utf-8")
        fresh.replace(folder / f"{name}.jsonl")
