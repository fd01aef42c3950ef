"""What mattered is told from what did not, with pruned trials counted in full."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import f_oneway, rankdata

from lora_search.results.importance import explained, groups_of, importances
from lora_search.trial import TrialRow
from tests.rows import make_row


def study(value_of: Callable[[float, int, float], float], num_trials: int = 60) -> list[TrialRow]:
    """Return trials of random settings; every other one was pruned at rung 2."""
    draw, rows = random.Random(7), []
    for number in range(num_trials):
        lr, r, dropout = 10 ** draw.uniform(-5, -3), draw.choice([8, 16, 32]), draw.uniform(0, 0.2)
        value = value_of(math.log10(lr), r, draw.gauss(0, 0.05))
        curve = {1: value + 2.0, 2: value + 1.0}
        curve |= {} if number % 2 else {3: value + 0.5, 4: value}
        row = make_row(number, "PRUNED" if number % 2 else "COMPLETE", min(curve.values()), max(curve))
        params = {"optim.lr": lr, "lora.r": r, "lora.dropout": dropout, "lora.alpha": 16.0}
        rows.append(TrialRow(**{**vars(row), "params": params, "perplexities": curve}))
    return rows


def test_a_setting_with_a_best_value_in_the_middle_is_found() -> None:
    lr, *others = importances(study(lambda log_lr, r, noise: 8 + abs(log_lr + 4) + noise))

    assert (lr.key, lr.is_sure, lr.rung, lr.trials) == ("optim.lr", True, 2, 60)
    assert lr.low < lr.share < lr.high
    assert lr.share > 0.5
    assert [one.is_sure for one in others] == [False, False]  # r and dropout; alpha never varies


def test_nothing_is_sure_where_only_chance_is_at_work() -> None:
    found = importances(study(lambda log_lr, r, noise: 8 + noise))

    assert len(found) == 3
    assert not any(one.is_sure for one in found)


def test_the_share_is_that_of_an_analysis_of_variance_of_the_ranks() -> None:
    draw = np.random.default_rng(3)
    groups, values = draw.integers(0, 3, 40), draw.normal(size=40)
    values += groups * 0.7
    ranks = rankdata(values) - 1

    f = f_oneway(*(ranks[groups == g] for g in range(3))).statistic
    epsilon_squared = 1 - 39 / (37 + 2 * f)  # from F, with 2 and 37 degrees of freedom

    assert explained(ranks, groups) == pytest.approx(epsilon_squared)


def test_a_trial_that_diverged_is_the_last_and_no_more() -> None:
    rows = study(lambda log_lr, r, noise: 8 + r / 8 + noise)
    worst = max(rows, key=lambda row: row.perplexities[2])
    gone = TrialRow(**{**vars(worst), "perplexities": {1: math.nan, 2: math.nan}, "state": "FAIL"})

    assert importances([*rows[: worst.number], gone, *rows[worst.number + 1 :]]) == importances(rows)


def test_a_setting_with_one_value_that_only_some_trials_have_explains_nothing() -> None:
    rows = study(lambda log_lr, r, noise: 8 + noise)
    some = [replace(row, params={**row.params, "optim.decay_ratio": 0.1}) for row in rows[:30]]

    assert importances([*some, *rows[30:]]) == importances(rows)


def test_few_trials_say_nothing() -> None:
    assert importances(study(lambda log_lr, r, noise: 8 + r, 7)) == []


def test_numbers_are_cut_into_groups_of_like_size_and_choices_stay() -> None:
    assert np.bincount(groups_of(list(np.linspace(0.1, 1, 20)))).tolist() == [5, 5, 5, 5]
    assert groups_of([8, 16, 8, 32]).tolist() == [2, 0, 2, 1]  # by name
