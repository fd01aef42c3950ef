"""Who is better beyond doubt: paired over rows and over seeds."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lora_search.results.confirmation import Confirmation, Duel, Repeat
from lora_search.results.confirmation_text import verdicts
from lora_search.service.comparisons import critical_value, duels_of
from lora_search.trial import RowScores, TrialRow

DUEL = Duel(
    leader=3, other=7, difference=0.012, row_error=0.004, seed_error=0.003, critical=2.2, num_rows=20,
    num_seeds=3,
)  # fmt: skip


def simulate(
    rng: np.random.Generator, gap: float, row_noise: float, seed_noise: float, num_rows: int, num_seeds: int
) -> dict[tuple[int, int], RowScores]:
    """Return the scores of trials 0 and 1: the second is worse by ``gap``, its rows and seeds vary."""
    tokens_R = rng.integers(20, 60, num_rows)
    rows_R, seeds_K = rng.normal(0, row_noise, num_rows), rng.normal(0, seed_noise, num_seeds)
    level_R = rng.normal(3.0, 0.5, num_rows)
    found = {}
    for seed in range(num_seeds):
        found[0, seed] = RowScores(tokens_R * level_R, tokens_R)
        found[1, seed] = RowScores(tokens_R * (level_R + gap + rows_R + seeds_K[seed]), tokens_R)
    return found


def test_tied_trials_are_seldom_called_different() -> None:
    rng = np.random.default_rng(0)

    called = [
        abs(duel.difference) > duel.critical * duel.error
        for _ in range(2000)
        for duel in duels_of(0, simulate(rng, 0.0, 0.03, 0.01, 20, 3))
    ]

    assert len(called) == 2000
    assert np.mean(called) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)
    assert np.mean(called) > 0.005  # nor does it never say anything


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(1)

    found = [duels_of(0, simulate(rng, 0.05, 0.03, 0.005, 50, 5))[0] for _ in range(200)]

    assert np.mean([duel.is_sure for duel in found]) > 0.95
    assert np.mean([duel.difference for duel in found]) == pytest.approx(0.05, abs=0.002)


def test_where_rows_do_not_vary_it_is_the_paired_t_test_over_seeds() -> None:
    scores = simulate(np.random.default_rng(2), 0.02, 0.0, 0.01, 20, 4)

    duel = duels_of(0, scores)[0]

    means = [[scores[trial, seed].mean_nll for seed in range(4)] for trial in (1, 0)]
    oracle = stats.ttest_rel(*means)
    assert duel.row_error < 1e-9
    assert duel.difference / duel.error == pytest.approx(oracle.statistic, rel=1e-6)
    assert duel.critical == pytest.approx(stats.t.ppf(0.975, 3), rel=1e-6)
    assert duel.is_sure == (oracle.pvalue < 0.05)


def test_the_level_is_shared_between_all_rivals() -> None:
    scores = simulate(np.random.default_rng(3), 0.02, 0.02, 0.01, 20, 3)
    more = scores | {(2, seed): scores[1, seed] for seed in range(3)}

    alone, together = duels_of(0, scores)[0], duels_of(0, more)[0]

    assert together.difference == alone.difference
    assert together.critical > alone.critical
    freedom = 1e9
    assert critical_value(1.0, int(freedom), 0.0, 3, 0.05 / 2) == pytest.approx(
        stats.norm.ppf(1 - 0.0125), rel=1e-6
    )


def test_only_seeds_that_both_trials_have_are_compared() -> None:
    scores = simulate(np.random.default_rng(4), 0.02, 0.02, 0.01, 20, 3)
    del scores[1, 0]

    assert duels_of(0, scores)[0].num_seeds == 2
    del scores[1, 1]
    assert duels_of(0, scores) == []


def test_the_rows_and_seeds_that_it_asks_for_would_just_do() -> None:
    tied = replace(DUEL, difference=0.009)
    assert not tied.is_sure
    assert tied.rows_needed is not None
    assert tied.seeds_needed is not None

    more_rows = replace(tied, row_error=tied.row_error * (tied.num_rows / tied.rows_needed) ** 0.5)
    more_seeds = replace(tied, seed_error=tied.seed_error * (tied.num_seeds / tied.seeds_needed) ** 0.5)
    too_few = replace(tied, row_error=tied.row_error * (tied.num_rows / (tied.rows_needed - 1)) ** 0.5)

    assert more_rows.is_sure
    assert more_seeds.is_sure
    assert not too_few.is_sure
    assert replace(tied, difference=0.001).rows_needed is None


def repeats(values: dict[int, list[float | None]]) -> tuple[Repeat, ...]:
    return tuple(
        Repeat(trial=trial, seed=seed, perplexity=value, rung=4, train_tokens=1000, train_seconds=2.0)
        for trial, found in values.items()
        for seed, value in enumerate(found, start=1)
    )


def row(number: int, perplexity: float) -> TrialRow:
    return TrialRow(
        number=number, state="COMPLETE", perplexity=perplexity, best_rung=4, params={},
        perplexities={4: perplexity}, reason="", examples_seen=1, train_tokens=1, train_seconds=1.0,
    )  # fmt: skip


def test_an_interval_that_excludes_0_shows_no_0() -> None:
    duel = replace(DUEL, difference=0.03, row_error=0.012, seed_error=0.0, critical=2.2)
    found = Confirmation(
        repeats=repeats({3: [30.0, 30.2], 7: [31.0, 31.2]}), duels=(duel,), confirmed_at="now"
    )

    (said, *_) = verdicts(found, [row(3, 29.0), row(7, 29.1)])

    assert duel.is_sure
    assert "(95 % interval +0.3 to +5.8 %)" in said


def test_the_verdict_says_who_is_better_and_what_would_separate_the_tied() -> None:
    found = Confirmation(
        repeats=repeats({3: [30.0, 30.2], 7: [31.0, 31.2], 9: [30.1, None]}),
        duels=(DUEL, replace(DUEL, other=9, difference=0.009)),
        confirmed_at="2026-01-01T00:00:00+00:00",
    )

    said = verdicts(found, [row(3, 29.0), row(7, 28.9), row(9, 31.0)])

    assert said[0].startswith(
        "Trial 3 is better than trial 7 beyond doubt: over 3 seeds and 20 validation rows, "
    )
    assert "trial 7 is 1.2 ± 0.5 % higher (95 % interval +0.1 to +2.3 %)" in said[0]
    assert (
        "Trials 3 and 9 are tied: over 3 seeds and 20 validation rows, the perplexity of trial 9 is 0.9 ±"
        in said[1]
    )
    assert "about 37 seeds or about 42 validation rows would separate them" in said[1]
    assert "Trial 9 diverged with 1 of 2 seeds." in said
    assert said[-1] == "The search chose trial 7, which is worse: take trial 3 (trial=3 in export and final)."
