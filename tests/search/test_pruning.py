"""The rung rule on simulated curves, and what is asked of Optuna's."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.storage import quieten_optuna
from lora_search.errors import ConfigError
from lora_search.search.pruning import RungPruner, make_pruner
from lora_search.search.trials import best_until
from lora_search.settings.schema import PrunerConfig

RUNGS = 9


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quieten_optuna()


def make_trial(number: int, curve: Sequence[float], state: TrialState = TrialState.RUNNING) -> FrozenTrial:
    """Return a trial with one value per rung so far."""
    return FrozenTrial(
        number=number, trial_id=number, state=state, value=None, datetime_start=None, datetime_complete=None,
        params={}, distributions={}, user_attrs={}, system_attrs={},
        intermediate_values={rung: value for rung, value in enumerate(curve, 1) if not math.isnan(value)},
    )  # fmt: skip


def losers(curves: Sequence[Sequence[float]], first_rung: int = 1, reduction_factor: int = 3) -> list[int]:
    trials = [make_trial(number, curve) for number, curve in enumerate(curves)]
    return sorted(RungPruner(first_rung, reduction_factor).losers(trials, trials))


def run_in_slots(
    curves: np.ndarray, slots: int, n_trials: int, fails_at: Mapping[int, int]
) -> list[TrialState]:
    """Train in so many slots, one rung a tick, judged every tick; a failed trial makes room for another."""
    pruner, trials = RungPruner(1, 3), [make_trial(number, ()) for number in range(len(curves))]
    begun: list[FrozenTrial] = []
    while True:
        running = [t for t in begun if t.state == TrialState.RUNNING]
        alive = sum(t.state != TrialState.FAIL for t in begun)
        new = min(slots - len(running), n_trials - alive)
        running += trials[len(begun) : len(begun) + new]
        begun = trials[: len(begun) + new]
        if not running:
            return [t.state for t in begun]
        for trial in running:
            rung = (trial.last_step or 0) + 1
            trial.intermediate_values[rung] = float(curves[trial.number, rung - 1])
            if rung == curves.shape[1]:
                trial.state = TrialState.COMPLETE
            if fails_at.get(trial.number) == rung:
                trial.state = TrialState.FAIL
        for number in pruner.losers(begun, [t for t in running if t.state == TrialState.RUNNING]):
            trials[number].state = TrialState.PRUNED


def random_curves(seed: int, count: int = 16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    final, start = rng.uniform(5, 20, (count, 1)), rng.uniform(1, 10, (count, 1))
    return final + start * np.exp(-np.arange(RUNGS) / 3) + rng.normal(0, 0.3, (count, RUNGS))


def test_the_best_third_of_a_rung_survives_whatever_the_order() -> None:
    survived = np.zeros(9)
    for seed in range(200):
        values = np.random.default_rng(seed).permutation(9)
        trials = [make_trial(number, [float(value)]) for number, value in enumerate(values)]
        order = np.random.default_rng(seed + 1000).permutation(9)

        stopped = RungPruner(1, 3).losers([trials[i] for i in order], [trials[i] for i in order])

        assert sorted(values[number] for number in range(9) if number not in stopped) == [0, 1, 2]
        survived += [number not in stopped for number in range(9)]

    # 200 draws at 1/3: 66.7 expected, standard deviation 6.7.
    assert survived.min() > 40
    assert survived.max() < 95


def test_equal_values_survive_together() -> None:
    assert losers([[3.0], [1.0], [1.0], [1.0], [2.0], [4.0]]) == [0, 4, 5]


def test_too_few_trials_at_a_rung_are_not_judged() -> None:
    assert losers([[1.0], [2.0]]) == []
    assert losers([[1.0], [2.0], [3.0]]) == [1, 2]


def test_the_first_at_a_rung_is_judged_again_when_better_ones_come() -> None:
    assert losers([[9.0, 9.0]]) == []
    assert losers([[9.0, 9.0], [1.0], [2.0]]) == [0, 2]


def test_a_trial_is_judged_by_its_best_so_far_at_the_highest_rung_it_reached() -> None:
    early_best = [1.0, 5.0, 5.0]
    trials = [early_best, [2.0, 2.0, 2.0], [3.0, 3.0, 3.0], [9.0, 0.5]]

    assert losers(trials) == [1, 2, 3]


def test_pruned_and_complete_trials_count_and_failed_ones_do_not() -> None:
    mine = make_trial(0, [5.0])
    states = (TrialState.PRUNED, TrialState.COMPLETE, TrialState.WAITING, TrialState.FAIL)
    pruner = RungPruner(1, 3)

    stopped = [
        bool(pruner.losers([mine, make_trial(1, [1.0], state), make_trial(2, [2.0], state)], [mine]))
        for state in states
    ]

    assert stopped == [False, True, True, False]  # beside pruned ones only, it is the study's last hope


def test_a_value_that_is_not_finite_ranks_last() -> None:
    assert losers([[math.inf], [5.0], [1.0]]) == [0, 1]
    assert best_until(make_trial(0, [math.inf, math.nan]), 2) == math.inf


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_a_study_always_has_a_complete_trial_and_most_are_pruned(slots: int) -> None:
    pruned = []
    for seed in range(200):
        states = run_in_slots(random_curves(seed), slots, 16, fails_at={})
        assert TrialState.COMPLETE in states
        pruned.append(states.count(TrialState.PRUNED) / len(states))

    assert np.mean(pruned) > 0.5


def test_a_study_has_a_complete_trial_even_when_leaders_fail_late() -> None:
    for seed in range(200):
        curves = random_curves(seed, count=24)
        best_four = np.argsort(curves.min(axis=1))[:4]
        states = run_in_slots(curves, 4, 16, fails_at=dict.fromkeys(best_four.tolist(), RUNGS))

        assert TrialState.COMPLETE in states
        assert states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED) == 16


def test_the_best_trial_completes_wherever_it_starts() -> None:
    """Constant curves, so the best is the best at every rung: its place in the queue must not matter."""
    for seed in range(200):
        level = np.random.default_rng(seed).permutation(16).astype(float)
        states = run_in_slots(np.repeat(level[:, None], RUNGS, axis=1), 4, 16, fails_at={})

        assert states[int(level.argmin())] == TrialState.COMPLETE


@pytest.mark.parametrize("name", ["median", "percentile", "wilcoxon"])
def test_optunas_rules_compare_with_complete_trials_in_our_rungs(name: str) -> None:
    pruner = make_pruner(PrunerConfig(name=name, first_rung=2, n_startup_trials=1), RUNGS)
    study = optuna.create_study(pruner=pruner)
    good, bad = study.ask(), study.ask()
    stopped_at = []
    for rung in range(1, RUNGS + 1):
        good.report(1.0 + 0.01 * rung, rung)
    study.tell(good, 1.0)

    for rung in range(1, RUNGS + 1):
        bad.report(2.0 + 0.02 * rung, rung)
        stopped_at += [rung] * bool(bad.should_prune())

    assert stopped_at[0] == {"median": 2, "percentile": 2, "wilcoxon": 3}[name]


def test_patient_stops_a_trial_that_no_longer_improves() -> None:
    trial = optuna.create_study(pruner=make_pruner(PrunerConfig(name="patient", patience=2), RUNGS)).ask()
    stopped_at = []
    for rung, value in enumerate([5.0, 4.0, 4.5, 4.5, 4.5, 4.5], 1):
        trial.report(value, rung)
        stopped_at += [rung] * bool(trial.should_prune())

    assert stopped_at[0] == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PrunerConfig(first_rung=4),
            "pruner.first_rung: must be at most 3, the rungs of the longest trial, got 4",
        ),
        (
            PrunerConfig(name="wilcoxon"),
            "pruner.name: needs 4 rungs .* there are 3, got 'wilcoxon'. Raise train",
        ),
    ],
)
def test_a_pruner_that_can_never_act_is_refused(config: PrunerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_pruner(config, 3)
