"""Judging from sums that are kept equals judging all trials anew: recorded sweeps in many orders."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState

from lora_search.search.pruning import NOBODY, RungPruner, Standings
from lora_search.search.trials import best_until
from tests.benchmarks.pruning import recorded_curves
from tests.replay import make_trial


def losers_of_all(
    rule: RungPruner, trials: Sequence[FrozenTrial], judged: Sequence[FrozenTrial]
) -> dict[int, str]:
    """The rule of docs/pruning.md, computed anew at each look. Up to version 0.2 this was our code."""
    lead = min(place(rule, t) for t in trials if t.state not in (TrialState.PRUNED, TrialState.FAIL))
    reasons = {}
    for trial in judged:
        rungs = rule.rungs(trial)
        if not rungs or place(rule, trial) <= lead:
            continue
        there = [t for t in trials if t.state != TrialState.FAIL and rungs[-1] in rule.rungs(t)]
        values = sorted(best_until(t, rungs[-1]) for t in there)
        kept = math.ceil(len(values) / rule.reduction_factor)
        own, limit = best_until(trial, rungs[-1]), values[kept - 1]
        if len(values) >= rule.reduction_factor and own > limit:
            reasons[trial.number] = (
                f"rung {rungs[-1]}: perplexity {own:.4f} is not among the best {kept} of {len(values)}"
                f" (<= {limit:.4f})"
            )
    return reasons


def place(rule: RungPruner, trial: FrozenTrial) -> tuple[int, float]:
    rung = max(rule.rungs(trial), default=0)
    best = best_until(trial, rung)
    return (-rung, best) if math.isfinite(best) else NOBODY


@pytest.mark.parametrize(
    "rule", [RungPruner(1, 3), RungPruner(1, 2), RungPruner(2, 3)], ids=["1,3", "1,2", "2,3"]
)
@pytest.mark.parametrize("seed", range(6))
def test_the_same_trials_are_stopped_for_the_same_reasons_at_every_look(rule: RungPruner, seed: int) -> None:
    rng = np.random.default_rng(seed)
    curves = recorded_curves()
    order = rng.permutation(len(curves))
    standings, trials, waiting, stopped = Standings(rule), list[FrozenTrial](), [*order], 0

    while waiting or any(t.state == TrialState.RUNNING for t in trials):
        running = [t for t in trials if t.state == TrialState.RUNNING]
        while waiting and len(running) < 6:
            running.append(make_trial(len(trials), ()))
            trials.append(running[-1])
            waiting.pop()
        moved = [t for t in running if rng.random() < 0.7]  # workers do not keep in step
        for trial in moved:
            curve = curves[order[-1 - trial.number]]
            rung = (trial.last_step or 0) + 1
            trial.intermediate_values[rung] = curve[rung - 1]
            if rng.random() < 0.02:
                trial.state = TrialState.FAIL
            elif rung == len(curve):
                trial.state = TrialState.COMPLETE
            standings.put(trial)
        judged = [t for t in running if t.state == TrialState.RUNNING]
        for trial in judged:
            standings.put(trial)
        expected = losers_of_all(rule, trials, judged) if judged else {}
        assert standings.losers(judged) == expected
        stopped += len(expected)
        for number in expected:  # as paused ones: some are taken up again
            trials[number].state = TrialState.PRUNED
            standings.put(trials[number])
        paused = [t for t in trials if t.state == TrialState.PRUNED and rng.random() < 0.05]
        for trial in paused[:1]:
            if len(trial.intermediate_values) < len(curves[order[-1 - trial.number]]):
                trial.state = TrialState.RUNNING
                standings.put(trial)

    assert stopped >= 5
