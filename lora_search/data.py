"""From rows to examples: duplicates out, a split that every row keeps, text as the model sees it, tokens.

The split depends on (seed, question) only: a row stays where it is when others are added, and rows that
share a question never stand on both sides. Costs one tokenization of the data, once per sweep.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_search.config import DataConfig, SweepConfig
from lora_search.errors import DataError
from lora_search.templates import Pair, Row, render

LONGEST = 100_000  # tokenizers without a limit report 10**30


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and completion; the loss is on ``input_ids[num_prompt_tokens:]``."""

    input_ids: tuple[int, ...]
    num_prompt_tokens: int


@dataclass(frozen=True)
class Splits:
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    max_length: int
    data_hash: str
    counts: dict[str, int]


def prepare(
    config: SweepConfig,
    loaded: tuple[list[Row], Counter[str]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> Splits:
    """Clean, split, render and tokenize; write the rendered pairs to
    ``folder``/{train,validation,test}.jsonl."""
    rows, counts = loaded[0], loaded[1].copy()
    unique = _without_duplicates(rows)
    counts["exact duplicates removed"] = len(rows) - len(unique)
    split_rows = split(unique, config.data, config.seed)
    caps = {
        "train": config.data.max_train_examples,
        "validation": config.data.max_validation_examples,
        "test": None,
    }
    pairs: dict[str, list[Pair]] = {}
    for name, members in split_rows.items():
        kept = members[: caps[name]]
        counts[f"{name} left out by cap"] = len(members) - len(kept)
        pairs[name] = [render(row, config.template, tokenizer) for row in kept]
    tokens = {name: [_tokenize(pair, tokenizer) for pair in members] for name, members in pairs.items()}
    max_length = _max_length(config.data, tokens["train"], tokenizer)
    examples = {name: _truncate(name, members, max_length, counts) for name, members in tokens.items()}
    _require_examples(examples, max_length)
    _write(pairs, folder)
    return Splits(
        **{name: tuple(members) for name, members in examples.items()},
        max_length=max_length,
        data_hash=_hash(pairs, max_length),
        counts={key: count for key, count in counts.items() if count}
        | {k: len(v) for k, v in examples.items()},
    )


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


def _split_key(keyed: tuple[str, Row]) -> tuple[str, str]:
    """Order by the hash's tail: its head decided the split."""
    digest, row = keyed
    return digest[12:], _normal(row.response)


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _without_duplicates(rows: Sequence[Row]) -> list[Row]:
    unique = {(_normal(row.question), _normal(row.response)): row for row in reversed(rows)}
    return list(reversed(unique.values()))


def _tokenize(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenize the parts apart, so that the boundary is exact; the template wrote the special tokens
    already."""
    prompt = tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
    completion = tokenizer(pair.completion, add_special_tokens=False)["input_ids"]
    return Example((*prompt, *completion), len(prompt))


def _max_length(config: DataConfig, train: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> int:
    limit = min(int(tokenizer.model_max_length), LONGEST)
    if isinstance(config.max_length, int):
        return min(config.max_length, limit)
    if not train:
        return limit
    lengths = [len(example.input_ids) for example in train]
    percentile = float(np.percentile(lengths, config.max_length_percentile))
    return min(math.ceil(percentile / 8) * 8, limit)


def _truncate(name: str, examples: Sequence[Example], max_length: int, counts: Counter[str]) -> list[Example]:
    """Cut rows at the end; leave out, and count, those whose prompt alone fills the length."""
    kept = [e for e in examples if e.num_prompt_tokens < max_length]
    counts[f"{name} left out: prompt fills max_length"] = len(examples) - len(kept)
    counts[f"{name} truncated"] = sum(len(e.input_ids) > max_length for e in kept)
    return [Example(e.input_ids[:max_length], e.num_prompt_tokens) for e in kept]


def _require_examples(examples: dict[str, list[Example]], max_length: int) -> None:
    for name in ("train", "validation"):
        if not examples[name]:
            raise DataError(
                f"data: no rows are left for {name} (max_length {max_length}). Give more rows, "
                f"raise data.max_length, or change data.validation_fraction."
            )


def _hash(pairs: dict[str, list[Pair]], max_length: int) -> str:
    text = json.dumps([max_length, {k: [(p.prompt, p.completion) for p in v] for k, v in pairs.items()}])
    return hashlib.sha256(text.encode()).hexdigest()


def _write(pairs: dict[str, list[Pair]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in pairs.items():
        lines = [
            json.dumps({"prompt": p.prompt, "completion": p.completion}, ensure_ascii=False) for p in members
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
