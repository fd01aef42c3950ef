"""From rows to examples: duplicates out, a split that every row keeps, text as the model sees it, tokens.

The split depends on (seed, question) only: a row stays where it is when others are added, and rows that share
a question never stand on both sides. Costs two tokenizations of the data, once per sweep.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_search.data.templates import Pair, Row, render
from lora_search.errors import DataError
from lora_search.settings.schema import DataConfig, SweepConfig, TemplateConfig, require

LONGEST = 100_000  # tokenizers without a limit report 10**30
SHOWN_ROWS = 3
LENGTH = "tokens in a training row:"  # so begin the counts of the token distribution


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and completion; the loss is on ``input_ids[num_prompt_tokens:]``."""

    input_ids: tuple[int, ...]
    num_prompt_tokens: int


@dataclass(frozen=True)
class Splits:
    """What is trained on and what it is judged by. ``data_hash``: of the rows, whatever their order."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    max_length: int
    data_hash: str
    counts: dict[str, int]
    pairs: dict[str, tuple[Pair, ...]] = field(default_factory=dict)  # the text of each split


@dataclass(frozen=True)
class _Item:
    """One row on its way: its text and its tokens."""

    source: str
    pair: Pair
    example: Example


def prepare(
    config: SweepConfig,
    loaded: tuple[list[Row], Counter[str]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None = None,
) -> Splits:
    """Clean, split, render, tokenize; write the pairs to ``folder`` where one is given."""
    rows, counts = loaded[0], loaded[1].copy()
    unique = _without_duplicates(rows)
    counts["exact duplicates removed"] = len(rows) - len(unique)
    counts["further answers kept beside their question"] = len(unique) - len(
        {_normal(r.question) for r in unique}
    )
    kept = _cap(split(unique, config.data, config.seed), config.data, counts)
    _require_both_sides(kept, config)
    items = {name: _items(members, config.template, tokenizer) for name, members in kept.items()}
    max_length = _max_length(config.data, [item.example for item in items["train"]], tokenizer)
    fitting = _leave_out_long_prompts(items, max_length, config.data, counts)
    cut = {name: _truncate(name, members, max_length, tokenizer, counts) for name, members in fitting.items()}
    splits = Splits(
        **{name: tuple(item.example for item in members) for name, members in cut.items()},
        max_length=max_length,
        data_hash=_hash(unique),
        counts={key: count for key, count in counts.items() if count}
        | {name: len(members) for name, members in cut.items()}
        | _lengths(items["train"]),
        pairs={name: tuple(item.pair for item in members) for name, members in cut.items()},
    )
    if folder is not None:
        write_pairs(splits, folder)
    return splits


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the training examples in one epoch: the same for every trial of a sweep."""
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(num_examples).tolist()
    return order


def split(rows: Sequence[Row], config: DataConfig, seed: int) -> dict[str, list[Row]]:
    """Return train, validation and test, each in an order of its own that additions do not disturb."""
    parts: dict[str, list[tuple[str, Row]]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        digest = hashlib.sha256(f"{seed}\n{_normal(row.question)}".encode()).hexdigest()
        place = int(digest[:12], 16) / 16**12
        if place < config.validation_fraction:
            parts["validation"].append((digest, row))
        elif place < config.validation_fraction + config.test_fraction:
            parts["test"].append((digest, row))
        else:
            parts["train"].append((digest, row))
    return {name: [row for _, row in sorted(part, key=_split_key)] for name, part in parts.items()}


def _split_key(keyed: tuple[str, Row]) -> tuple[str, tuple[str, str, str]]:
    """Order by the hash's tail: its head decided the split."""
    digest, row = keyed
    return digest[12:], _identity(row)


def _normal(text: str) -> str:
    """Return what makes a question the same question: not its white space, not its capitals."""
    return " ".join(text.split()).casefold()


def _identity(row: Row) -> tuple[str, str, str]:
    """Return what makes a row an exact duplicate: everything but the amount of white space."""
    return " ".join(row.instruction.split()), " ".join(row.context.split()), " ".join(row.response.split())


def _without_duplicates(rows: Sequence[Row]) -> list[Row]:
    unique: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        unique.setdefault(_identity(row), row)
    return list(unique.values())


def _hash(rows: Sequence[Row]) -> str:
    text = json.dumps(sorted(_identity(row) for row in rows))
    return hashlib.sha256(text.encode()).hexdigest()


def _cap(parts: dict[str, list[Row]], config: DataConfig, counts: Counter[str]) -> dict[str, list[Row]]:
    caps = {"train": config.max_train_examples, "validation": config.max_validation_examples}
    kept = {name: members[: caps.get(name)] for name, members in parts.items()}
    for name, members in parts.items():
        counts[f"{name} left out by cap"] = len(members) - len(kept[name])
    return kept


def _require_both_sides(parts: dict[str, list[Row]], config: SweepConfig) -> None:
    num_rows = sum(len(members) for members in parts.values())
    for name, remedy in (("train", "lower"), ("validation", "raise")):
        if not parts[name]:
            raise DataError(
                f"data.validation_fraction: of {num_rows} different rows none falls to {name} "
                f"(validation_fraction={config.data.validation_fraction}, "
                f"test_fraction={config.data.test_fraction}, seed={config.seed}). "
                f"Give more rows, {remedy} data.validation_fraction, or try another seed."
            )


def _items(rows: Sequence[Row], template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> list[_Item]:
    pairs = [render(row, template, tokenizer) for row in rows]
    prompts = _tokenize([pair.prompt for pair in pairs], tokenizer)
    wholes = _tokenize([pair.prompt + pair.completion for pair in pairs], tokenizer)
    return [
        _Item(row.source, pair, _example(pair, prompt, whole, tokenizer))
        for row, pair, prompt, whole in zip(rows, pairs, prompts, wholes, strict=True)
    ]


def _example(pair: Pair, prompt: list[int], whole: list[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Keep the boundary exact: a model that answers gets the prompt's own tokens and goes on from there.

    The whole text mostly begins with them. Where it does not (a token would straddle the boundary), the parts
    are joined. Always joining them would teach SentencePiece models a blank too many before each answer.
    """
    if whole[: len(prompt)] == prompt:
        return Example(tuple(whole), len(prompt))
    (completion,) = _tokenize([pair.completion], tokenizer)
    return Example((*prompt, *completion), len(prompt))


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of each text. The template wrote the special tokens already."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _max_length(config: DataConfig, train: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> int:
    limit = min(int(tokenizer.model_max_length), LONGEST)
    if isinstance(config.max_length, int):
        rule = f"must be at most {limit}, the longest input of the model"
        require(config.max_length <= limit, "data.max_length", config.max_length, rule)
        return config.max_length
    lengths = [len(example.input_ids) for example in train]
    enough = math.ceil(float(np.percentile(lengths, config.max_length_percentile)) / 8) * 8
    if not config.max_length_choices:
        return min(enough, limit)
    choices = sorted(config.max_length_choices)
    chosen = next((choice for choice in choices if choice >= enough), choices[-1])
    rule = f"must be at most {limit}, the longest input of the model"
    require(chosen <= limit, "data.max_length_choices", chosen, rule)
    return chosen


def _lengths(train: Sequence[_Item]) -> dict[str, int]:
    """Return the token distribution in three figures, before anything is cut."""
    lengths = [len(item.example.input_ids) for item in train]
    median, most = np.percentile(lengths, (50, 99))
    return {
        f"{LENGTH} median": round(float(median)),
        f"{LENGTH} 99 % up to": math.ceil(float(most)),
        f"{LENGTH} longest": max(lengths),
    }


def _leave_out_long_prompts(
    items: dict[str, list[_Item]], max_length: int, config: DataConfig, counts: Counter[str]
) -> dict[str, list[_Item]]:
    """Leave out, and count, rows whose prompt alone fills the length; refuse if the user chose the length."""
    fitting = {n: [i for i in part if i.example.num_prompt_tokens < max_length] for n, part in items.items()}
    too_long = [i for part in items.values() for i in part if i.example.num_prompt_tokens >= max_length]
    nothing_left = not fitting["train"] or not fitting["validation"]
    if nothing_left or (too_long and config.on_bad_row == "refuse" and config.max_length != "auto"):
        shown = [f"{i.source}: {i.example.num_prompt_tokens} tokens before the answer" for i in too_long]
        most = max(i.example.num_prompt_tokens for i in too_long)
        skip = "" if nothing_left else ", or leave such rows out with data.on_bad_row=skip"
        raise DataError(
            f"data.max_length: {len(too_long)} rows have no room for an answer in {max_length} tokens:\n  "
            + "\n  ".join(shown[:SHOWN_ROWS])
            + f"\nRaise data.max_length above {most}{skip}."
        )
    for name, part in items.items():
        counts[f"{name} left out: prompt fills max_length"] = len(part) - len(fitting[name])
    return fitting


def _truncate(
    name: str,
    items: Sequence[_Item],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
) -> list[_Item]:
    """Cut rows at the end, in tokens and in text."""
    counts[f"{name} truncated"] = sum(len(item.example.input_ids) > max_length for item in items)
    return [_cut(item, max_length, tokenizer) for item in items]


def _cut(item: _Item, max_length: int, tokenizer: PreTrainedTokenizerBase) -> _Item:
    example = item.example
    if len(example.input_ids) <= max_length:
        return item
    short = replace(example, input_ids=example.input_ids[:max_length])
    completion = tokenizer.decode(list(short.input_ids[short.num_prompt_tokens :]))
    return _Item(item.source, Pair(item.pair.prompt, completion), short)


def write_pairs(splits: Splits, folder: Path) -> None:
    """Write the text that the model sees to ``folder``/{train,validation,test}.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in splits.pairs.items():
        lines = [
            json.dumps({"prompt": p.prompt, "completion": p.completion}, ensure_ascii=False) for p in members
        ]
        fresh = folder / f"{name}.{os.getpid()}.new"  # each worker writes the same
        fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        fresh.replace(folder / f"{name}.jsonl")
