"""What a sampler sees of a study, small and large."""

import math
import statistics
from collections.abc import Sequence

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from lora_search.database.storage import quieten_optuna
from lora_search.search.extrapolation import as_complete
from lora_search.search.sampling import NUM_BEST, NUM_SPREAD, Outlook, Remembered, make_sampler
from lora_search.search.trials import PAUSED
from lora_search.settings.schema import SamplerConfig
from lora_search.trial import draw_seed

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-5, 1e-2, log=True),
    "r": CategoricalDistribution([8, 16, 32]),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quieten_optuna()


class PlainTpe(optuna.samplers.BaseSampler):
    """Optuna's own, new and seeded for each trial, over the whole study: what ours must equal."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        seed = draw_seed(0, trial.number)
        self.tpe = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, multivariate=True)

    def infer_relative_search_space(self, study, trial):  # type: ignore[no-untyped-def]
        return self.tpe.infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):  # type: ignore[no-untyped-def]
        return self.tpe.sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):  # type: ignore[no-untyped-def]
        return self.tpe.sample_independent(study, trial, param_name, param_distribution)


def search(sampler: optuna.samplers.BaseSampler, num_packs: int = 8) -> list[dict[str, object]]:
    """Return what is tried in packs of three, of which the second is pruned."""
    study = optuna.create_study(sampler=sampler)
    for _ in range(num_packs):
        pack = [study.ask(SPACE) for _ in range(3)]
        for trial in pack:
            trial.report(abs(trial.params["lr"] - 1e-3), 1)
        study.tell(pack[0], abs(pack[0].params["lr"] - 1e-3))
        study.tell(pack[1], state=TrialState.PRUNED)
        study.tell(pack[2], state=TrialState.FAIL)
    return [trial.params for trial in study.trials]


def finished(number: int, value: float) -> FrozenTrial:
    trial = create_trial(value=value, params={"lr": 1e-3, "r": 8}, distributions=SPACE)
    trial.number = number
    return trial


def remembered(trials: Sequence[FrozenTrial]) -> list[int]:
    memory = Remembered()
    for trial in trials:
        memory.add(trial)
    return sorted(t.number for t in memory.trials())


def test_a_study_of_ordinary_size_is_searched_as_optunas_tpe_does() -> None:
    assert search(make_sampler(SamplerConfig(), SPACE, 0)) == search(PlainTpe())


def test_a_large_study_is_seen_by_its_best_and_an_even_share_of_the_others() -> None:
    small = [finished(number, float(number)) for number in range(NUM_SPREAD)]
    large = [finished(number, float(number % 1000)) for number in range(10_000)]

    seen = remembered(large)

    assert remembered(small) == list(range(NUM_SPREAD))
    best = sorted(range(10_000), key=lambda number: (number % 1000, number))[:NUM_BEST]
    assert seen == sorted({*best, *range(0, 10_000, 32)})


def test_which_trials_are_seen_does_not_depend_on_the_order_in_which_they_ended() -> None:
    large = [finished(number, float(number % 7)) for number in range(2_000)]

    assert remembered(large) == remembered(large[::-1])


def test_a_paused_trial_teaches_tpe_what_a_pruned_one_does() -> None:
    drawn = []
    for is_paused in (False, True):
        study = optuna.create_study(sampler=make_sampler(SamplerConfig(n_startup_trials=2), SPACE, 0))
        for value in (1.0, 2.0, 3.0, 4.0):
            trial = study.ask(SPACE)
            trial.report(value, 1)
            trial.set_user_attr(PAUSED, is_paused)
            if not is_paused:
                study.tell(trial, state=TrialState.PRUNED)
        drawn.append(study.ask(SPACE).params)

    assert drawn[0] == drawn[1]


def test_a_widened_range_stays_part_of_what_tpe_models_together() -> None:
    wide = {**SPACE, "lr": FloatDistribution(1e-6, 1e-1, log=True)}
    sampler = make_sampler(SamplerConfig(), wide, 0)
    study = optuna.create_study(sampler=sampler)
    study.add_trials([finished(number, float(number)) for number in range(8)])

    trial = study.ask(wide)

    assert trial.relative_params.keys() == {"lr", "r"}


def distances_of_draws(name: str, num_pruned: int, seed: int = 0) -> list[float]:
    """Return how far, in decades, five draws lie from the best learning rate after so many pruned trials."""
    sampler = make_sampler(SamplerConfig(name=name, n_startup_trials=3), SPACE, seed)
    study, distances = optuna.create_study(sampler=sampler), []
    for number in range(num_pruned + 5):
        trial = study.ask(SPACE)
        distance = abs(math.log10(trial.params["lr"]) + 3)
        trial.report(30.0 * math.exp(0.2 * distance), 1)
        study.tell(trial, state=TrialState.PRUNED)
        distances += [distance] if number >= num_pruned else []
    return distances


def test_gp_learns_from_pruned_trials() -> None:
    by_gp, by_chance = distances_of_draws("gp", 4), distances_of_draws("random", 4)

    assert statistics.median(by_gp) < 0.5 * statistics.median(by_chance)


def test_cmaes_learns_from_pruned_trials() -> None:
    """It moves by generations of four: after ten of them it draws near the best."""
    by_cmaes, by_chance = (
        [d for seed in range(4) for d in distances_of_draws(name, 40, seed)] for name in ("cmaes", "random")
    )

    assert statistics.median(by_cmaes) < 0.5 * statistics.median(by_chance)


def test_a_pruned_trial_is_expected_to_fall_as_the_complete_ones_did_from_its_rung() -> None:
    ends = create_trial(value=10.0, intermediate_values={1: 20.0, 2: 10.0})
    pruned = [create_trial(state=TrialState.PRUNED, intermediate_values={1: v}) for v in (24.0, 30.0)]
    silent = create_trial(state=TrialState.PRUNED, intermediate_values={1: math.nan})

    shown = as_complete([ends, *pruned, silent])

    assert [math.exp(trial.value or 0.0) for trial in shown] == pytest.approx([10.0, 12.0, 15.0])
    assert {trial.state for trial in shown} == {TrialState.COMPLETE}
    assert pruned[0].state == TrialState.PRUNED


@pytest.mark.parametrize("study_name", list("abcdef"))
def test_tpe_sees_the_trials_of_every_bracket_of_hyperband(study_name: str) -> None:
    sampler = make_sampler(SamplerConfig(n_startup_trials=2), SPACE, 0)
    pruner = optuna.pruners.HyperbandPruner(1, 9, 3)
    study = optuna.create_study(sampler=sampler, pruner=pruner, study_name=study_name)
    study.ask(SPACE).should_prune()  # from now on each trial has a bracket
    running = [study.ask(SPACE) for _ in range(4)]
    for value in range(12):
        running[0].report(float(value), 1)
        study.tell(running.pop(0), float(value))
        running.append(study.ask(SPACE))

    assert isinstance(sampler, Outlook)
    assert [t.number for t in sampler._view.get_trials()] == [t.number for t in study.trials[:-1]]
