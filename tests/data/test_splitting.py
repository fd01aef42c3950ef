"""Splits of the user's own, and groups: what is judged by was never trained on."""

from collections import Counter
from dataclasses import replace

import pytest

from lora_search.data.splitting import remove_leakage, split
from lora_search.errors import DataError
from lora_search.reading.rows import Row
from lora_search.settings.schema import DataConfig

ROWS = [Row(f"Question {i}?", "", f"Answer {i}.", f"a.jsonl:{i}", group=f"doc {i // 4}") for i in range(200)]
NAMES = ("train", "validation", "test")


def test_rows_of_one_group_are_on_one_side() -> None:
    parts = split(ROWS, DataConfig(), 0)

    groups = [{row.group for row in parts[name]} for name in NAMES]
    assert all(groups)
    assert groups[0] & groups[1] == groups[0] & groups[2] == groups[1] & groups[2] == set()


@pytest.mark.parametrize("seed", range(5))
def test_groups_that_share_a_question_are_on_one_side(seed: int) -> None:
    linked = [replace(row, instruction=" QUESTION 0?") for row in ROWS[::16]]

    parts = split([*ROWS, *linked], DataConfig(), seed)

    together = {row.group for row in linked}
    assert sum(bool(together & {row.group for row in parts[name]}) for name in NAMES) == 1


def test_own_splits_stay_and_what_they_lack_is_taken_out_of_the_rest() -> None:
    own = [Row(f"Own {i}?", "", "A.", f"v.jsonl:{i}", split="validation") for i in range(30)]

    parts = split([*ROWS, *own], DataConfig(), 0)

    assert set(parts["validation"]) == set(own)
    assert len(parts["test"]) > 0
    assert len(parts["train"]) + len(parts["test"]) == len(ROWS)


def test_a_question_of_two_own_splits_is_refused_with_both_places() -> None:
    parts = {
        "train": ROWS[:3],
        "validation": [replace(ROWS[1], instruction="question  1?", source="v:9")],
        "test": [],
    }

    with pytest.raises(
        DataError, match=r"1 of 3 train rows ask what validation or test rows ask.*\n  a.jsonl:1 and v:9\n"
    ):
        remove_leakage(parts, DataConfig(), Counter())


def test_a_question_of_two_own_splits_may_leave_the_earlier_one() -> None:
    counts: Counter[str] = Counter()
    parts = {"train": ROWS[:4], "validation": ROWS[2:6], "test": ROWS[5:6]}

    remove_leakage(parts, DataConfig(on_leakage="remove"), counts)

    assert parts == {"train": ROWS[:2], "validation": ROWS[2:5], "test": ROWS[5:6]}
    assert counts["train left out: asked in validation or test as well"] == 2
