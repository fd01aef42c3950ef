"""How sure a ranking is: standard errors against closed forms, a jackknife and simulation."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_search.files.row_scores import BASE, VALIDATION, read_scores, write_scores
from lora_search.results.certainty import SURE, certainty_of, compare
from lora_search.trial import RowScores, TrialRow
from tests.rows import make_row

RNG = np.random.default_rng(0)
TOKENS_R = RNG.integers(20, 200, 64)
HARD_R = TOKENS_R * RNG.gamma(4.0, 0.5, 64)  # what makes a row hard makes it hard for every trial


def scores(shift: float, noise: float = 0.05, seed: int = 1, tokens_R: np.ndarray = TOKENS_R) -> RowScores:
    """Return NLLs around those of the rows, ``shift`` per token higher."""
    rng = np.random.default_rng(seed)
    return RowScores(HARD_R + tokens_R * (shift + noise * rng.standard_normal(len(tokens_R))), tokens_R)


def test_rows_of_one_length_have_the_textbook_standard_error_of_a_mean() -> None:
    tokens_R = np.full(64, 10)
    first = RowScores(RNG.normal(20.0, 3.0, 64), tokens_R)
    second = RowScores(first.nll_R + RNG.normal(0.5, 1.0, 64), tokens_R)

    found = compare(second, first)

    excess_R = (second.nll_R - first.nll_R) / 10
    assert found is not None
    assert found.difference == pytest.approx(excess_R.mean())
    assert found.error == pytest.approx(excess_R.std(ddof=1) / math.sqrt(64))


def test_rows_of_many_lengths_have_the_error_that_a_jackknife_finds() -> None:
    first, second = scores(0.0, seed=1), scores(0.02, seed=2)

    found = compare(second, first)

    excess_R, everything = second.nll_R - first.nll_R, np.arange(64)
    left_out = [excess_R[everything != i].sum() / TOKENS_R[everything != i].sum() for i in range(64)]
    jackknife = math.sqrt(63 / 64 * sum((value - np.mean(left_out)) ** 2 for value in left_out))
    assert found is not None
    assert found.error == pytest.approx(jackknife, rel=0.03)


def test_equal_trials_are_called_tied_as_often_as_two_standard_errors_promise() -> None:
    pairs = [compare(scores(0.0, seed=2 * i + 10), scores(0.0, seed=2 * i + 11)) for i in range(400)]

    share = np.mean([pair is not None and pair.is_tied for pair in pairs])
    assert 0.91 <= share <= 0.98  # 95.4 % for normal errors; 400 draws vary by about 1 %


def test_pairing_sees_what_each_value_alone_does_not() -> None:
    found = compare(scores(0.05, seed=2), scores(0.0, seed=1))

    alone = (scores(0.0).nll_R / TOKENS_R).std(ddof=1) / 8
    assert found is not None
    assert not found.is_tied
    assert found.error < alone / 5


def test_as_many_rows_as_are_asked_for_do_separate() -> None:
    found = compare(scores(0.004, seed=2), scores(0.0, seed=1))

    assert found is not None
    assert found.is_tied
    assert found.rows_needed is not None
    assert found.rows_needed > 64
    error_then = found.error * math.sqrt(64 / found.rows_needed)
    assert abs(found.difference) == pytest.approx(SURE * error_then, rel=0.02)


def test_scores_of_other_rows_are_not_compared() -> None:
    assert compare(scores(0.0), scores(0.0, tokens_R=TOKENS_R[::-1])) is None
    assert compare(RowScores(HARD_R[:1], TOKENS_R[:1]), RowScores(HARD_R[:1], TOKENS_R[:1])) is None


def stored(folder: Path, number: int, row_scores: RowScores, state: str = "COMPLETE") -> TrialRow:
    """Return a trial whose scores of rung 12 are in its folder."""
    write_scores(folder / "trials" / str(number), row_scores, 12)
    return make_row(number, state, row_scores.perplexity)


def test_a_study_tells_the_tied_from_the_beaten(tmp_path: Path) -> None:
    write_scores(tmp_path, scores(0.5), 0, BASE)
    rows = [
        stored(tmp_path, 0, scores(0.0, seed=1)),
        stored(tmp_path, 1, scores(0.004, seed=2)),
        stored(tmp_path, 2, scores(0.2, seed=3)),
        stored(tmp_path, 3, scores(0.01, seed=4), "PRUNED"),
    ]

    certainty = certainty_of(rows, tmp_path)

    best = min(rows[:3], key=lambda row: row.perplexity or 0.0).number
    assert [row.number for row in certainty.tied(rows)] == [1 - best]
    assert not certainty.against_base[best].is_tied
    assert sorted(certainty.against_best) == sorted({0, 1, 2, 3} - {best})


def test_digits_end_where_the_rows_do(tmp_path: Path) -> None:
    rows = [stored(tmp_path, 0, scores(0.0, seed=1)), stored(tmp_path, 1, scores(0.01, seed=2))]

    certainty = certainty_of(rows, tmp_path)

    (comparison,) = certainty.against_best.values()
    assert 0.005 < comparison.error < 0.02
    assert certainty.decimals(8.5) == 2  # 8.5 * 0.0083 = 0.07: the second decimal is the last that counts
    assert certainty.decimals(850.0) == 0


@pytest.mark.parametrize("damage", ["missing", "of another rung", "of another study", "no archive"])
def test_scores_that_are_not_of_the_best_rung_are_left_out(tmp_path: Path, damage: str) -> None:
    row, other = stored(tmp_path, 0, scores(0.0)), stored(tmp_path, 1, scores(0.01, seed=2))
    place = tmp_path / "trials/1"
    if damage == "missing":
        (place / VALIDATION).unlink()
    elif damage == "of another rung":
        write_scores(place, scores(0.01, seed=2), 11)
    elif damage == "of another study":
        other = replace(other, perplexity=99.0)
    else:
        (place / VALIDATION).write_bytes(b"PK\x03\x04 cut short")

    assert certainty_of([row, other], tmp_path).against_best == {}


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write_scores(tmp_path, scores(0.1), 7)

    found = read_scores(tmp_path)

    assert found is not None
    assert found[0].nll_R.tolist() == scores(0.1).nll_R.tolist()
    assert found[0].tokens_R.tolist() == TOKENS_R.tolist()
    assert found[1] == 7
