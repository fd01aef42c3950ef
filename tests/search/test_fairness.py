"""Who survives does not depend on slot, order or batch size: simulated engines, 200 seeds for every rule."""

from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from lora_search.data.order import DataAxis
from lora_search.data.rows import Example
from lora_search.database.storage import quieten_optuna
from lora_search.search.pruning import RungPruner, make_pruner, stopped_by_optuna
from lora_search.settings.schema import PrunerConfig
from lora_search.trial import TrialSettings
from tests.conftest import SETTINGS
from tests.replay import make_trial, replay

SEEDS, SLOTS, RUNGS = 200, 6, 4
BATCH_SIZES = (4, 8, 16, 32)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quieten_optuna()


def curves(seed: int, count: int, rungs: int = RUNGS) -> np.ndarray:
    """Return curves that fall to a level of their own, with noise; all drawn alike."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(5, 10, (count, 1))
    return level + 3 * np.exp(-np.arange(rungs)) + rng.normal(0, 1, (count, rungs))


def first_pack(seed: int) -> list[FrozenTrial]:
    """Return the COMPLETE trials that most of Optuna's rules compare with."""
    return [
        create_trial(value=curve.min(), intermediate_values=dict(enumerate(curve.tolist(), 1)))
        for curve in curves(seed + 1000, 3)
    ]


def lockstep(study: optuna.Study, seed: int) -> list[bool]:
    """Train a pack whose trials report together, rung for rung; return who came to its end, by slot."""
    pack: dict[int, Trial] = {trial.number: trial for trial in (study.ask() for _ in range(SLOTS))}
    values, numbers = curves(seed, SLOTS), list(pack)
    for rung in range(1, RUNGS + 1):
        for slot, number in enumerate(numbers):
            if number in pack:
                pack[number].report(float(values[slot, rung - 1]), rung)
        running = [t for t in study.get_trials(deepcopy=False) if t.number in pack]
        for stopped in stopped_by_optuna(study, running, seed):
            study.tell(pack.pop(stopped.number), state=TrialState.PRUNED)
    return [number in pack for number in numbers]


def assert_even(survived: np.ndarray) -> None:
    """Assert that every slot survives as often, within 4 standard deviations of as many tosses of a coin."""
    rate = survived.mean()
    deviation = np.sqrt(rate * (1 - rate) / len(survived))
    assert 0.05 < rate < 0.95
    assert np.abs(survived.mean(axis=0) - rate).max() < 4 * deviation


@pytest.mark.parametrize(
    "name", ["hyperband", "median", "percentile", "patient", pytest.param("wilcoxon", marks=pytest.mark.slow)]
)
def test_with_optunas_rules_every_slot_survives_as_often(name: str) -> None:
    survived = []
    for seed in range(SEEDS):
        config = PrunerConfig(name=name, n_startup_trials=3, patience=1)
        study = optuna.create_study(study_name=f"s{seed}", pruner=make_pruner(config, RUNGS))
        study.add_trials(first_pack(seed))
        survived.append(lockstep(study, seed))

    assert_even(np.array(survived))


@pytest.mark.parametrize("resume", [False, True])
def test_with_the_rung_rule_every_slot_survives_as_often(resume: bool) -> None:
    survived = []
    for seed in range(SEEDS):
        result = replay(curves(seed, SLOTS, RUNGS).tolist(), SLOTS, RungPruner(1, 3), resume)
        survived.append([state == TrialState.COMPLETE for state in result.states])

    assert_even(np.array(survived))


AXIS = DataAxis(tuple(Example((number,), 0) for number in range(200)), 0)  # 25 examples a rung: no batch fits


def train_on(trial: FrozenTrial, settings: TrialSettings, seen: int, level: float, noise: np.ndarray) -> None:
    """Report the rungs that whole optimizer steps have passed once so many examples were seen."""
    is_last = seen == len(AXIS.examples)
    stepped = seen if is_last else seen // settings.batch_size * settings.batch_size
    rung = (trial.last_step or 0) + 1
    while stepped >= AXIS.rung_examples(settings, rung):
        trial.intermediate_values[rung] = float(level + 3 * np.exp(-stepped / 50) + noise[rung - 1])
        rung += 1
    trial.state = TrialState.COMPLETE if is_last else TrialState.RUNNING


def pruned_by_batch_size(seed: int) -> list[tuple[int, bool]]:
    """Train 16 trials of four batch sizes at once, four examples a tick; return size and fate of each."""
    rng, rule = np.random.default_rng(seed), RungPruner(1, 3)
    batch_sizes = rng.permutation(np.repeat(BATCH_SIZES, 4)).tolist()
    settings = [
        replace(SETTINGS, batch_size=b, gradient_accumulation_steps=1, epochs=1, evals_per_epoch=8)
        for b in batch_sizes
    ]
    levels, noise = rng.uniform(5, 10, 16), rng.normal(0, 0.3, (16, 8))
    trials = [make_trial(number, ()) for number in range(16)]
    for seen in range(4, len(AXIS.examples) + 1, 4):
        running = [t for t in trials if t.state == TrialState.RUNNING]
        for t in running:
            train_on(t, settings[t.number], seen, levels[t.number], noise[t.number])
        judged = [t for t in running if t.state == TrialState.RUNNING]
        for number in rule.losers(trials, judged):
            trials[number].state = TrialState.PRUNED
    pruned = [t.state == TrialState.PRUNED for t in trials]
    return list(zip(batch_sizes, pruned, strict=True))


def test_batch_sizes_from_4_to_32_are_pruned_as_often() -> None:
    fates = [fate for seed in range(SEEDS) for fate in pruned_by_batch_size(seed)]

    rates = [np.mean([pruned for size, pruned in fates if size == batch_size]) for batch_size in BATCH_SIZES]

    assert min(rates) > 0.5
    assert max(rates) - min(rates) < 0.06  # 800 trials of each: a standard deviation of 1.6 points
