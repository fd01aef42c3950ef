"""Removes duplicates and splits rows into train, validation and test.

The split depends only on (seed, question): a row stays in its split when others are added, and rows with the
same question are in the same split. The first spelling in alphabetical order decides for all spellings of a
question (composed characters or not, full width, zero-width characters).
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from lora_search.errors import DataError
from lora_search.reading.rows import Row
from lora_search.reading.text import normal_answer, normal_question, question_key
from lora_search.settings.schema import DataConfig, SweepConfig

SHOWN_ROWS = 3


def split(rows: Sequence[Row], config: DataConfig, seed: int) -> dict[str, list[Row]]:
    """Return train, validation and test, each in an order that does not change when rows are added.

    The user's own splits are kept; missing ones are split off the other rows.
    """
    parts: dict[str, list[tuple[str, Row]]] = {"train": [], "validation": [], "test": []}
    own = {row.split for row in rows}
    to_validation = 0.0 if "validation" in own else config.validation_fraction
    to_test = 0.0 if "test" in own else config.test_fraction
    keys = [side_key(row) for row in rows]
    sides = _sides(rows, keys)
    for row, key in zip(rows, keys, strict=True):
        digest = hashlib.sha256(f"{seed}\n{sides[key]}".encode()).hexdigest()
        place = int(digest[:12], 16) / 16**12
        if row.split in ("validation", "test"):
            parts[row.split].append((digest, row))
        elif place < to_validation:
            parts["validation"].append((digest, row))
        elif place < to_validation + to_test:
            parts["test"].append((digest, row))
        else:
            parts["train"].append((digest, row))
    return {name: _ordered(part) for name, part in parts.items()}


def short(text: str) -> bytes:
    """Return a key of a text, for sets and mappings of a million of them."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def side_key(row: Row) -> bytes:
    """Return a key of the row's question: rows that have the same are in the same split."""
    return short(question_key(row.question))


def _sides(rows: Sequence[Row], keys: Sequence[bytes]) -> dict[bytes, str]:
    """Return question -> the text that determines its split: its first spelling, or its group. Groups that
    share a question are merged."""
    spellings: dict[bytes, str] = {}
    group_of: dict[bytes, str] = {}
    joined: dict[str, str] = {}  # group -> an alphabetically earlier group that it is merged into
    for row, key in zip(rows, keys, strict=True):
        spelling = normal_question(row.question)
        spellings[key] = min(spelling, spellings.get(key, spelling))
        if row.group:
            first, second = sorted((_root(row.group, joined), _root(group_of.get(key, row.group), joined)))
            if first != second:
                joined[second] = first
            group_of[key] = first
    return {key: _root(group_of[key], joined) if key in group_of else text for key, text in spellings.items()}


def _root(group: str, joined: dict[str, str]) -> str:
    while group in joined:
        group = joined[group]
    return group


def remove_leakage(parts: dict[str, list[Row]], config: DataConfig, counts: Counter[str]) -> None:
    """Remove rows from the user's splits whose question is also in a later split, or raise DataError."""
    for name, others in (("train", ("validation", "test")), ("validation", ("test",))):
        judged = {_asked(row): row for other in others for row in parts[other]}
        leaking = [row for row in parts[name] if _asked(row) in judged]
        if leaking and config.on_leakage == "refuse":
            shown = [f"{row.source} and {judged[_asked(row)].source}" for row in leaking[:SHOWN_ROWS]]
            raise DataError(
                f"data.on_leakage: {len(leaking)} of {len(parts[name])} {name} rows ask what "
                f"{' or '.join(others)} rows ask as well:\n  " + "\n  ".join(shown) + "\n"
                "Fix the splits, or leave such rows out of the first with data.on_leakage=remove."
            )
        parts[name] = [row for row in parts[name] if _asked(row) not in judged]
        counts[f"{name} left out: asked in {' or '.join(others)} as well"] += len(leaking)


def _asked(row: Row) -> bytes:
    """Return a key of the row's question; for a conversation, of all questions."""
    texts = [row.question]
    if row.messages:
        texts = [turn["content"] for turn in row.turns if turn["role"] == "user"]
    return short(question_key("\n".join(texts)))


def _ordered(keyed: list[tuple[str, Row]]) -> list[Row]:
    """Order by the end of the hash, as its beginning has determined the split, then by the texts."""
    keyed.sort(key=lambda pair: pair[0][12:])
    same_question = groupby(keyed, key=lambda pair: pair[0][12:])
    groups = ([row for _, row in group] for _, group in same_question)
    return [
        row
        for group in groups
        for row in (sorted(group, key=lambda row: (words(row), row.response)) if group[1:] else group)
    ]


def words(row: Row) -> tuple[str, str, str]:
    """Return the row's texts with white space normalized; for a conversation all of it."""
    return _spaced(row.instruction), _spaced(row.messages + row.tools or row.context), _spaced(row.response)


def _spaced(text: str) -> str:
    spaced = " ".join(text.split())
    return text if text == spaced else spaced  # no second copy of a million texts


def identity(row: Row) -> tuple[str, str, str]:
    """Return a key that is equal for exact duplicates: without differences in white space, except line breaks
    and indentation of the answer, or in the composition of characters."""
    instruction, context, _ = (unicodedata.normalize("NFC", text) for text in words(row))
    return instruction, context, normal_answer(row.response)


def without_duplicates(rows: Iterable[Row]) -> list[Row]:
    """Return one row per identity; of different spellings, or weights, always the same one, in any order of
    the rows. Each of the user's splits is handled separately."""
    unique: dict[bytes, Row] = {}
    for row in rows:
        key = short(json.dumps((*identity(row), row.split)))
        if key not in unique or _rank(row) < _rank(unique[key]):
            unique[key] = row
    return list(unique.values())


def _rank(row: Row) -> tuple[object, ...]:
    """Order duplicates: the one to keep is first, of equal texts the one that counts most."""
    return *words(row), -row.loss_weight


def cap(parts: dict[str, list[Row]], config: DataConfig, counts: Counter[str]) -> dict[str, list[Row]]:
    kept = {name: members[: config.cap(name)] for name, members in parts.items()}
    for name, members in parts.items():
        counts[f"{name} left out by cap"] = len(members) - len(kept[name])
    return kept


def require_both_sides(parts: dict[str, list[Row]], config: SweepConfig) -> None:
    """Raise DataError if no row is left to train on, or none to validate on."""
    for name, change in (("train", "lower"), ("validation", "raise")):
        if parts[name]:
            continue
        rows = [row for members in parts.values() for row in members]
        num_groups = _num_groups(rows)
        groups = f" in {num_groups} group{'s' * (num_groups > 1)}" if num_groups else ""
        give = "A group stays on one side: give rows of more groups" if num_groups else "Give more rows"
        others = f", {change} data.validation_fraction, or try another seed."
        remedy = f"{give}{others if num_groups != 1 else ', or group by another column.'}"
        key = "data.group_by" if num_groups else "data.validation_fraction"
        raise DataError(
            f"{key}: of {len(rows)} different rows{groups} "
            f"none falls to {name} (validation_fraction={config.data.validation_fraction}, "
            f"test_fraction={config.data.test_fraction}, seed={config.seed}). {remedy}"
        )


def _num_groups(rows: Sequence[Row]) -> int:
    """Return how many groups there are, those that share a question counted as one."""
    grouped = [row for row in rows if row.group]
    return len(set(_sides(grouped, [side_key(row) for row in grouped]).values()))
