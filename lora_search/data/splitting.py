"""Which row is trained on and which is judged by: duplicates out, a split that every row keeps.

The split depends on (seed, question) only: a row stays where it is when others are added, and rows that share
a question are never on both sides. Spellings of one question (composed characters or not, full width,
zero-width characters) go where the first of them in alphabetical order goes.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence

from lora_search.data.rows import Row
from lora_search.data.text import normal_answer, normal_question, question_key
from lora_search.errors import DataError
from lora_search.settings.schema import DataConfig, SweepConfig


def split(rows: Sequence[Row], config: DataConfig, seed: int) -> dict[str, list[Row]]:
    """Return train, validation and test, each in an order of its own that additions do not disturb."""
    parts: dict[str, list[tuple[str, Row]]] = {"train": [], "validation": [], "test": []}
    spellings = _first_spellings(rows)
    for row in rows:
        spelling = spellings[question_key(row.question)]
        digest = hashlib.sha256(f"{seed}\n{spelling}".encode()).hexdigest()
        place = int(digest[:12], 16) / 16**12
        if place < config.validation_fraction:
            parts["validation"].append((digest, row))
        elif place < config.validation_fraction + config.test_fraction:
            parts["test"].append((digest, row))
        else:
            parts["train"].append((digest, row))
    return {name: [row for _, row in sorted(part, key=_split_key)] for name, part in parts.items()}


def _first_spellings(rows: Sequence[Row]) -> dict[str, str]:
    """Return question key -> the spelling of it that decides its place."""
    spellings: dict[str, str] = {}
    for row in rows:
        key, spelling = question_key(row.question), normal_question(row.question)
        spellings[key] = min(spelling, spellings.get(key, spelling))
    return spellings


def _split_key(keyed: tuple[str, Row]) -> tuple[str, tuple[str, str, str], str]:
    """Order by the hash's tail: its head decided the split."""
    digest, row = keyed
    return digest[12:], words(row), row.response


def words(row: Row) -> tuple[str, str, str]:
    """Return the row's three texts without the amount of white space."""
    return " ".join(row.instruction.split()), " ".join(row.context.split()), " ".join(row.response.split())


def identity(row: Row) -> tuple[str, str, str]:
    """Return what makes a row an exact duplicate: not the amount of white space, but for line breaks and
    indentation of the answer; not how its characters are composed."""
    instruction, context, _ = (unicodedata.normalize("NFC", text) for text in words(row))
    return instruction, context, normal_answer(row.response)


def without_duplicates(rows: Sequence[Row]) -> list[Row]:
    """Return one row of each identity; of spellings the same one, whatever the order of the rows."""
    unique: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = identity(row)
        if key not in unique or words(row) < words(unique[key]):
            unique[key] = row
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
