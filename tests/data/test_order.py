import math
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

from lora_search.data.order import DataAxis
from lora_search.data.rows import Example
from tests.conftest import make_run
from tests.harness import random_splits


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own(tmp_path) -> None:  # type: ignore[no-untyped-def]
    axis = DataAxis(random_splits(num_train=13).train, seed=3)
    settings = make_run(tmp_path, batch_size=3, gradient_accumulation_steps=1).settings

    epochs = [[axis.batch(start + seen, settings) for seen in range(0, 13, 3)] for start in (0, 13)]

    assert [len(batch) for batch in epochs[0]] == [3, 3, 3, 3, 1]
    orders = [[example for batch in batches for example in batch] for batches in epochs]
    assert sorted(orders[0], key=str) == sorted(axis.examples, key=str) == sorted(orders[1], key=str)
    assert orders[0] != orders[1]


def test_rungs_are_shares_of_an_epoch_and_end_with_the_last(tmp_path) -> None:  # type: ignore[no-untyped-def]
    axis = DataAxis(random_splits(num_train=13).train, seed=0)
    settings = make_run(tmp_path, epochs=2, evals_per_epoch=2).settings

    assert [axis.rung_examples(settings, rung) for rung in range(1, 6)] == [7, 13, 20, 26, math.inf]
    assert axis.total_steps(settings) == 8


class Million(Sequence[Example]):
    """A million rows of which each is made on access."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return Example((index, 1, 2), 1)


def test_an_epoch_of_a_million_rows_is_one_array_and_makes_the_rows_of_a_step_only(tmp_path: Path) -> None:
    settings = make_run(tmp_path, batch_size=16, gradient_accumulation_steps=4).settings
    axis = DataAxis(Million(), seed=1)
    tracemalloc.start()

    batch = axis.batch(64_000, settings)

    assert len(batch) == 64
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20  # the permutation takes 8 MB
    tracemalloc.stop()
