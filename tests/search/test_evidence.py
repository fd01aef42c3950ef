"""What docs/pruning.md rests on: truths made of recorded curves, and searches replayed on them."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import optuna
import pytest
from scipy.linalg import cho_solve

from lora_search.database.storage import quieten_optuna
from tests.benchmarks.contenders import BATCHES, OURS, RANKS, contenders, top_of_one_rung
from tests.benchmarks.families import BARE, CURVES, Family, families
from tests.benchmarks.nearby import Nearby
from tests.benchmarks.record import RECORDINGS
from tests.benchmarks.regret_plot import plot
from tests.benchmarks.search import BUDGETS, TRUTHS, search
from tests.benchmarks.surrogate import Surrogate


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quieten_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module", params=["faq", "docs"])
def surrogate(request: pytest.FixtureRequest) -> Surrogate:
    return Surrogate(*families(request.param))


def test_every_family_is_recorded_in_full_at_least_150_curves() -> None:
    recorded = {name: family["trials"] for name, family in json.loads(CURVES.read_text()).items()}

    assert {name: len(trials) for name, trials in recorded.items()} == {
        name: recording.num_trials for name, recording in RECORDINGS.items()
    }
    assert sum(map(len, recorded.values())) >= 150
    for name, recording in RECORDINGS.items():
        num_rungs = recording.epochs * recording.evals_per_epoch
        for trial in recorded[name]:
            assert 0 < len(trial["losses"]) <= num_rungs
            assert all(math.isfinite(loss) for loss in trial["losses"])
            assert len(trial.get("row_losses", [])) in (0, recording.rows[1])


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_trial_that_hardly_leaves_the_base_is_not_taken_for_a_diverged_one(name: str) -> None:
    (family,) = families(name)
    slowest = min(range(len(family.params)), key=lambda n: family.params[n]["optim.lr"])

    kept_K = np.exp(family.curves_NK[slowest])

    recorded = json.loads(CURVES.read_text())[name]["trials"][slowest]["losses"]
    np.testing.assert_allclose(kept_K, recorded)


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_trials_whose_first_rung_measures_the_bare_base_are_known(name: str) -> None:
    (family,) = families(name)
    rows, per_epoch = RECORDINGS[name].rows[0], RECORDINGS[name].evals_per_epoch

    for params in family.params:
        one_step = rows <= params["train.batch_size"] * per_epoch
        assert family.untrained_rung(params) == int(one_step)

    bare = [family.untrained_rung(params) == 1 for params in family.params]
    assert len(set(family.curves_NK[bare, 0])) <= 1  # whatever the learning rate


def test_the_surrogate_misses_a_curve_that_it_has_not_seen_by_less_than_a_percent_in_the_median(
    surrogate: Surrogate,
) -> None:
    assert np.median(np.abs(surrogate.left_out_NK)) < 0.01


def test_what_it_says_to_miss_is_what_a_fit_without_the_curve_misses(surrogate: Surrogate) -> None:
    x_ND, y_NK, theta = surrogate.x_ND, surrogate.y_NK, surrogate.theta
    noise = np.exp(2 * theta[3]) + 1e-6
    covariance = surrogate._kernel(x_ND, x_ND, theta) + noise * np.eye(len(x_ND))
    for left_out in (0, 5, 17):
        others = np.delete(np.arange(len(x_ND)), left_out)
        weights = np.linalg.solve(covariance[np.ix_(others, others)], y_NK[others])

        predicted_K = covariance[left_out, others] @ weights

        missed_K = surrogate.scale * (y_NK[left_out] - predicted_K)
        np.testing.assert_allclose(surrogate.left_out_NK[left_out], missed_K, atol=1e-8)


def test_without_new_residuals_a_task_gives_the_recorded_curves_back(surrogate: Surrogate) -> None:
    task = surrogate.task(0)
    task.weights_NK = cho_solve(surrogate.factor, surrogate.y_NK)

    given_NK = np.log(np.log(task.curves(surrogate.family.params)))

    assert np.median(np.abs(given_NK - surrogate.family.curves_NK)) < 0.01


@pytest.mark.parametrize(
    ("truth", "name"),
    [(truth, OURS) for truth in TRUTHS]
    + [(truth, "freeze-thaw, first trials") for truth in ("gp", "table")]
    + [("gp", "tpe, hyperband")],
)
@pytest.mark.parametrize("family", families("faq", "docs"), ids=lambda family: family.name)
def test_a_replayed_search_is_the_same_again_and_never_better_than_the_best(
    family: Family, truth: str, name: str
) -> None:
    task = TRUTHS[truth](family).task(3)

    found = search(contenders()[name], family, task, 3)

    assert found == search(contenders()[name], family, task, 3)
    assert len(found) == len(BUDGETS)
    assert min(found) >= 0.995 * task.best()  # gp: of a grid of rates


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_the_table_knows_nothing_but_recorded_curves_and_each_task_half_of_them(family: Family) -> None:
    recorded = {tuple(curve_K) for curve_K in np.exp(np.exp(family.curves_NK))}
    tasks = [Nearby(family, 1).task(seed) for seed in range(3)]

    given = [{tuple(curve_K) for curve_K in task.curves(points_of(family))} for task in tasks]

    for task, curves in zip(tasks, given, strict=True):
        assert len(task.params) == len(family.params) // 2
        assert curves <= recorded
        assert min(min(curve) for curve in curves) >= task.best()
    assert len({frozenset(curves) for curves in given}) == 3


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_neighbours_go_through_the_curves_that_they_know_and_stay_between_them(family: Family) -> None:
    task = Nearby(family, 4).task(0)
    settings = [tuple(one.values()) for one in task.params]
    once = [n for n, one in enumerate(settings) if settings.count(one) == 1]

    at_their_own_NK, between_MK = task.curves(task.params), task.curves(points_of(family))

    known_NK = np.exp(np.exp(task.curves_NK))
    np.testing.assert_allclose(at_their_own_NK[once], known_NK[once], rtol=0.005)
    assert len(once) > 3
    assert (between_MK >= known_NK.min(axis=0) - 1e-9).all()
    assert (between_MK <= known_NK.max(axis=0) + 1e-9).all()


@pytest.mark.parametrize("truth", ["table", "neighbours"])
@pytest.mark.parametrize("family", families(*BARE), ids=lambda family: family.name)
def test_settings_measure_the_bare_base_at_their_first_rung_where_recorded_ones_do(
    family: Family, truth: str
) -> None:
    bare = [n for n, one in enumerate(family.params) if family.untrained_rung(one)]
    base = np.exp(np.exp(family.curves_NK[bare[0], 0]))
    task = TRUTHS[truth](family).task(0)

    first_M = task.curves(points_of(family))[:, 0] / base

    bare_M = np.array([family.untrained_rung(one) == 1 for one in points_of(family)])
    np.testing.assert_allclose(first_M[bare_M], 1, rtol=1e-3)  # with fewer than four, a trace of others
    assert np.abs(first_M[~bare_M] - 1).max() > 0.05


def points_of(family: Family) -> list[dict[str, float]]:
    """Return settings all over the space."""
    rates = np.geomspace(*family.rates, 7)
    return [
        {"optim.lr": lr, "lora.r": r, "train.batch_size": b} for lr in rates for r in RANKS for b in BATCHES
    ]


def test_the_rule_of_one_rung_judges_nobody_at_a_rung_that_measures_the_bare_base_or_by_it() -> None:
    study, stopped = optuna.create_study(), list[list[int]]()
    curves = [(9.0, 8.0), (9.3, 8.3), (9.5, 8.5), (9.1, 8.9)]
    for untrained in (0, 0, 0, 1):
        study.ask().set_user_attr("progress", {"untrained_rung": untrained})
    for rung in (1, 2):
        for trial, values in zip(study.get_trials(), curves, strict=True):
            study._storage.set_trial_intermediate_value(trial._trial_id, rung, values[rung - 1])

        stopped.append(top_of_one_rung(study, study.get_trials(), share=0.5))

    assert stopped == [[2], [3]]  # with the bare 9.1 among the values, 9.3 would end too


def test_the_plot_has_a_line_for_every_contender_that_ran_and_a_panel_for_every_family() -> None:
    regrets = {name: np.full((5, len(BUDGETS)), 0.02) for name in (OURS, "random", "a rule")}

    picture = ElementTree.fromstring(plot({"faq": regrets, "docs": regrets}, BUDGETS))

    panels = picture.findall("{http://www.w3.org/2000/svg}g")
    lines = [panel.findall("{http://www.w3.org/2000/svg}path[@class='line']") for panel in panels]
    assert [len(found) for found in lines] == [2, 2]
