"""What all validation rows begin with is computed once, and changes nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_search.data.rows import Example
from lora_search.engine.evaluation import score_rows, shareable_tokens
from lora_search.engine.packed_model import PackedModel, SlotRows
from lora_search.engine.packing import common_prefix, passes_in_order
from tests.conftest import make_run
from tests.harness import build_engine, random_splits

BEGINNING = (7, 5, 11, 13, 17, 19)
SPLITS = replace(
    random_splits(),
    validation=tuple(Example((*BEGINNING, *range(20 + n, 20 + 2 * n)), 8) for n in (9, 4, 12, 5, 7)),
)


class CountingModel:
    """The model, with a record of the tokens that it computes."""

    def __init__(self, model: PackedModel) -> None:
        self.model, self.device, self.tokens = model, model.device, 0

    def nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        self.tokens += sum(pack.num_tokens for pack in packs)
        return self.model.nll(packs)


@pytest.mark.parametrize("tokens_per_pass", [30, 70, 1000])
def test_sharing_the_beginning_gives_the_same_perplexities(
    tiny_llama: Path, tmp_path: Path, tokens_per_pass: int
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=3)
    engine.admit([make_run(tmp_path, number, r=2 * number + 2) for number in range(3)])
    generator = torch.Generator().manual_seed(0)
    for slot, row in engine.bank.rows.items():
        row.theta[0].normal_(std=0.2, generator=generator)
        engine.bank.refresh(slot)

    scores = [
        score_rows(engine.model, (0, 2), SPLITS.validation, tokens_per_pass, num_shared)
        for num_shared in (0, engine.num_shared)
    ]
    alone, shared = ([row_scores.perplexity for row_scores in kind] for kind in scores)

    assert engine.num_shared == len(BEGINNING)
    assert shared == pytest.approx(alone, rel=1e-6)
    assert alone[0] != pytest.approx(alone[1], rel=1e-4)


def test_each_row_has_the_score_that_it_has_alone_and_in_its_own_place(tiny_llama: Path) -> None:
    model = build_engine(tiny_llama, SPLITS).model

    (together,) = score_rows(model, (None,), SPLITS.validation, 10_000, len(BEGINNING))

    alone = [score_rows(model, (None,), [row], 10_000)[0].nll_R.item() for row in SPLITS.validation]
    assert together.nll_R.tolist() == pytest.approx(alone, rel=1e-5)
    assert together.tokens_R.tolist() == [7, 2, 10, 3, 5]  # not by length


def test_shared_tokens_are_computed_once_per_slot_and_pass(tiny_llama: Path) -> None:
    model = CountingModel(build_engine(tiny_llama, SPLITS).model)

    score_rows(model, (None, None), SPLITS.validation, 10_000, len(BEGINNING))  # type: ignore[arg-type]

    assert model.tokens == 2 * (len(BEGINNING) + 9 + 4 + 12 + 5 + 7)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([Example((1, 2, 3, 4, 5), 4), Example((1, 2, 3, 9, 5, 6), 4)], 3),
        ([Example((1, 2, 3, 4, 5), 2), Example((1, 2, 3, 9, 5, 6), 4)], 1),  # 2 predicts a completion
        ([Example((1, 2, 3), 1), Example((1, 2, 4), 1)], 0),
        ([Example((1, 2, 3), 2), Example((4, 2, 3), 2)], 0),
        ([Example((1, 2, 3), 2)], 0),  # nobody to share with
    ],
)
def test_rows_share_what_they_begin_with_short_of_the_last_prompt_token(
    tiny_llama: Path, rows: list[Example], expected: int
) -> None:
    assert shareable_tokens(build_engine(tiny_llama, SPLITS).model, rows) == expected


class Misaligned(CountingModel):
    """A device whose attention mistakes the queries of a row for its first tokens."""

    dtype, is_row_by_row = torch.float32, False

    def nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        return [
            nll * (1.0 + bool(pack.num_shared)) for nll, pack in zip(super().nll(packs), packs, strict=True)
        ]


def test_nothing_is_shared_where_that_would_change_the_numbers(tiny_llama: Path) -> None:
    model = Misaligned(build_engine(tiny_llama, SPLITS).model)

    assert shareable_tokens(model, SPLITS.validation) == 0  # type: ignore[arg-type]


def test_the_common_prefix_of_rows_in_any_order() -> None:
    assert common_prefix([(1, 2, 3), (1, 2), (1, 2, 9, 4)]) == 2
    assert common_prefix([(3, 1), (3, 1)]) == 2
    assert common_prefix([(1,), (2,), (1,)]) == 0


def test_passes_go_slot_after_slot_and_hold_the_budget() -> None:
    passes = list(passes_in_order(2, [10, 10, 30, 10], 4, 30))

    assert passes == [{0: [0, 1]}, {0: [2]}, {0: [3], 1: [0, 1]}, {1: [2]}, {1: [3]}]


def test_a_long_beginning_does_not_fill_a_pass_with_keys() -> None:
    passes = list(passes_in_order(1, [1010] * 50, 1000, 1100))

    assert [sum(map(len, taken.values())) for taken in passes] == [4] * 12 + [2]
