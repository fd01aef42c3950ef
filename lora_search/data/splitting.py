"""Which row is trained on and which is judged by: duplicates out, a split that every row keeps.

The split depends on (seed, question) only: a row stays where it is when others are added, and rows that share
a question never stand on both sides.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

from lora_search.data.rows import Row
from lora_search.errors import DataError
from lora_search.settings.schema import DataConfig, SweepConfig


def split(rows: Sequence[Row], config: DataConfig, seed: int) -> dict[str, list[Row]]:
    """Return train, validation and test, each in an order of its own that additions do not disturb."""
    parts: dict[str, list[tuple[str, Row]]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        digest = hashlib.sha256(f"{seed}\n{normal_question(row.question)}".encode()).hexdigest()
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
    return digest[12:], identity(row)


def normal_question(text: str) -> str:
    """Return what makes a question the same question: not its white space, not its capitals."""
    return " ".join(text.split()).casefold()


def identity(row: Row) -> tuple[str, str, str]:
    """Return what makes a row an exact duplicate: everything but the amount of white space."""
    return " ".join(row.instruction.split()), " ".join(row.context.split()), " ".join(row.response.split())


def without_duplicates(rows: Sequence[Row]) -> list[Row]:
    unique: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        unique.setdefault(identity(row), row)
    return list(unique.values())


def cap(parts: dict[str, list[Row]], config: DataConfig, counts: Counter[str]) -> dict[str, list[Row]]:
    caps = {"train": config.max_train_examples, "validation": config.max_validation_examples}
    kept = {name: members[: caps.get(name)] for name, members in parts.items()}
    for name, members in parts.items():
        counts[f"{name} left out by cap"] = len(members) - len(kept[name])
    return kept


def require_both_sides(parts: dict[str, list[Row]], config: SweepConfig) -> None:
    num_rows = sum(len(members) for members in parts.values())
    for name, remedy in (("train", "lower"), ("validation", "raise")):
        if not parts[name]:
            raise DataError(
                f"data.validation_fraction: of {num_rows} different rows none falls to {name} "
                f"(validation_fraction={config.data.validation_fraction}, "
                f"test_fraction={config.data.test_fraction}, seed={config.seed}). "
                f"Give more rows, {remedy} data.validation_fraction, or try another seed."
            )
