"""A forecast against replays of recorded curves, and its arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
from optuna.pruners import MedianPruner, NopPruner

from lora_search.search.forecast import Probe, Shape, forecast, shares_trained, trials_within
from lora_search.search.pruning import RungPruner, ThawPruner
from tests.benchmarks.pruning import recorded_curves
from tests.replay import replay

SHAPE = Shape(num_trials=10, num_workers=1, num_slots=4, num_rungs=8, trial_tokens=8000)
PROBE = Probe(train_tokens_per_second=100.0, eval_seconds=5.0, setup_seconds=20.0, final_seconds=10.0)


def test_the_range_that_pruning_leaves_holds_what_recorded_curves_train() -> None:
    rule, curves, trained = RungPruner(1, 3), recorded_curves(), []
    for seed in range(40):
        chosen = np.random.default_rng(seed).choice(len(curves), size=SHAPE.num_trials, replace=False)
        trained.append(replay([curves[i] for i in chosen], 4, rule, resume=False).num_rungs)

    least, expected, most = shares_trained(rule, SHAPE, seed=0)

    assert least < np.mean(trained) / 80 < most
    assert expected == pytest.approx(np.mean(trained) / 80, rel=0.2)


def test_without_pruning_everything_is_trained_and_an_unknown_rule_has_a_wide_range() -> None:
    assert shares_trained(NopPruner(), SHAPE, seed=0) == (1.0, 1.0, 1.0)
    assert shares_trained(MedianPruner(), SHAPE, seed=0) == (1 / 8, 1.0, 1.0)


@pytest.mark.parametrize(("count", "expected"), [(1, 1.0), (10, 0.67), (14, 0.59), (1000, 0.42)])
def test_freeze_thaw_trains_the_less_of_its_trials_the_more_there_are(count: int, expected: float) -> None:
    least, mean, most = shares_trained(ThawPruner(), replace(SHAPE, num_trials=count), seed=0)

    assert mean == pytest.approx(expected, abs=0.01)
    assert least <= mean <= most


def test_a_trial_takes_its_training_and_its_evaluations_and_workers_share_the_trials() -> None:
    found = forecast(SHAPE, PROBE, (0.25, 0.5, 1.0))

    assert found.trial_seconds == 8000 / 100 + 8 * 5
    assert found.seconds == (30 + 2.5 * 120, 30 + 5 * 120, 30 + 10 * 120)
    assert found.tokens == (20_000, 40_000, 80_000)
    assert found.training_share == pytest.approx(80 / 120)
    assert trials_within(20 + 5 * 120, SHAPE, PROBE, 0.5, found.trial_seconds) == 10
