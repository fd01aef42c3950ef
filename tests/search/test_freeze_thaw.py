"""Freeze-thaw: its process against dense algebra, its choices where clear."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from lora_search.search.freeze_thaw import (
    MOST_CELLS,
    Cells,
    Curves,
    FreezeThaw,
    Posterior,
    cost,
    fit,
    improvement,
    prior,
    root_of,
    told_cells,
)

NUM_RUNGS, SLOTS = 5, 4


def cells(num_trials: int, num_rungs: int, seed: int) -> Cells:
    rng = np.random.default_rng(seed)
    who_N = torch.arange(num_trials).repeat_interleave(num_rungs)
    x_ID = torch.from_numpy(rng.random((num_trials, 2)))
    share_K = torch.log(torch.arange(1, num_rungs + 1).double() / num_rungs)
    return Cells(x_ID[who_N], share_K.repeat(num_trials), who_N)


def covariance_of(theta: np.ndarray, a: Cells, i: int, b: Cells, j: int) -> float:
    """The kernel of two cells, written out."""
    length, (worth, change, curve, level, _) = math.exp(theta[2]), np.exp(2 * theta[3:])
    distance = sum(float(a.x_ND[i, d] - b.x_ND[j, d]) ** 2 / math.exp(2 * theta[d]) for d in range(2))
    gap = math.sqrt(5) * abs(float(a.share_N[i] - b.share_N[j])) / length
    kt = (1 + gap + gap**2 / 3) * math.exp(-gap)
    kx = math.exp(-distance / 2)
    same = float(a.who_N[i] == b.who_N[j])
    return float(1 + worth * kx + change * kx * kt + curve * kt + level * same)


def matrix(theta: np.ndarray, a: Cells, b: Cells) -> np.ndarray:
    rows = range(len(a.who_N))
    return np.array([[covariance_of(theta, a, i, b, j) for j in range(len(b.who_N))] for i in rows])


def test_the_posterior_is_that_of_dense_algebra_over_a_kernel_written_out() -> None:
    known, asked = cells(4, 3, 0), cells(3, 4, 1)
    theta = (prior(2)[0] + torch.linspace(-0.5, 0.5, 8)).double()
    y_N = torch.from_numpy(np.random.default_rng(2).normal(size=12))

    mean_M, sd_M = Posterior(theta, known, y_N).marginal(asked)

    noise = math.exp(2 * float(theta[-1])) + 1e-6
    inverse = np.linalg.inv(matrix(theta.numpy(), known, known) + noise * np.eye(12))
    cross = matrix(theta.numpy(), asked, known)
    left = matrix(theta.numpy(), asked, asked) - cross @ inverse @ cross.T
    np.testing.assert_allclose(mean_M, cross @ inverse @ y_N.numpy(), atol=1e-8)
    np.testing.assert_allclose(sd_M**2, np.diag(left), atol=1e-8)


def test_samples_have_the_mean_and_covariance_of_the_posterior() -> None:
    known, asked = cells(4, 3, 0), cells(2, 2, 1)
    theta, y_N = prior(2)[0], torch.from_numpy(np.random.default_rng(2).normal(size=12))
    posterior, generator = Posterior(theta, known, y_N), torch.Generator().manual_seed(0)

    drawn = torch.cat([posterior.samples(asked, generator) for _ in range(200)], dim=1)

    mean_M, sd_M = posterior.marginal(asked)
    error = float(sd_M.max()) / math.sqrt(drawn.shape[1])
    np.testing.assert_allclose(drawn.mean(1), mean_M, atol=5 * error)
    np.testing.assert_allclose(drawn.std(1), sd_M, rtol=0.05)


def test_the_likelihood_is_that_of_a_normal_and_a_fit_raises_it() -> None:
    known, mean = cells(4, 3, 0), prior(2)[0]
    y_N = torch.from_numpy(np.random.default_rng(2).normal(size=12))

    before, after = cost(mean, known, y_N), cost(fit(mean, known, y_N), known, y_N)

    noise = (math.exp(2 * float(mean[-1])) + 1e-6) * torch.eye(12).double()
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(12).double(), torch.from_numpy(matrix(mean.numpy(), known, known)) + noise
    )
    expected = -normal.log_prob(y_N) - 6 * math.log(2 * math.pi)
    np.testing.assert_allclose(before, expected, rtol=1e-8)
    assert after < before - 1


def test_the_expected_improvement_is_its_integral() -> None:
    for best, mean, sd in ((0.0, 0.3, 0.5), (-1.0, -1.2, 0.1), (0.5, 2.0, 0.4)):
        expected, _ = quad(lambda y, b=best, m=mean, s=sd: (b - y) * norm.pdf(y, m, s), mean - 12 * sd, best)

        found = improvement(torch.tensor(best).double(), torch.tensor(mean), torch.tensor(sd).double())

        assert math.isclose(float(found), expected, rel_tol=1e-5, abs_tol=1e-9)


def trained(*values: list[float]) -> Curves:
    points = [[i / len(values), 0.5, (3 * i % len(values)) / len(values)] for i in range(len(values))]
    return Curves(points, [1.0] * len(values), list(values))


def test_nobody_gets_two_slots_and_no_finished_trial_gets_one() -> None:
    curves = trained([3.0, 2.8, 2.7, 2.6, 2.55], [3.2, 3.0], [3.1, 2.9, 2.8], [3.3], [3.25])
    for seed in range(5):
        new = np.random.default_rng(seed).random((20, 3)).tolist()

        chosen = FreezeThaw(3, NUM_RUNGS, seed).choose(curves, new, [1.0] * 20, SLOTS)

        assert len(set(chosen)) == SLOTS
        assert all(1 <= number < 5 + 20 for number in chosen)


def test_until_a_trial_has_finished_the_best_two_go_on_then_they_need_not() -> None:
    curves = trained([3.0, 2.99], [2.5], [3.1, 3.1], [2.9], [math.nan])
    new = np.random.default_rng(0).random((20, 3)).tolist()

    chosen = FreezeThaw(3, NUM_RUNGS, 0).choose(curves, new, [1.0] * 20, SLOTS)

    assert {1, 3} <= set(chosen)

    overfitting = trained([2.5, 2.6, 2.8, 3.0, 3.2], [2.51, 2.62, 2.83, 3.05], [2.9, 2.7, 2.6], [3.5], [3.4])
    chosen = FreezeThaw(3, NUM_RUNGS, 0).choose(overfitting, new, [1.0] * 20, SLOTS)

    assert 1 not in chosen  # the second best, which only gets worse


def test_settings_that_promise_nothing_wait_for_those_that_promise_much() -> None:
    curves = trained([3.0, 2.8], [3.1, 2.9], [3.05], [3.2])
    new = np.random.default_rng(0).random((20, 3)).tolist()

    chosen = FreezeThaw(3, NUM_RUNGS, 0).choose(curves, new, [1.0] * 10 + [0.0] * 10, SLOTS)

    assert max(chosen) < 4 + 10


def spread(num_trials: int, num_rungs: int) -> Curves:
    """Trials whose values fall by the rung and are the better the lower their number."""
    return trained(*([3.0 + 0.1 * i - 0.05 * k for k in range(num_rungs)] for i in range(num_trials)))


@pytest.mark.parametrize("place", [0, 1])
def test_what_trains_elsewhere_is_not_chosen_and_its_gain_is_not_sought_twice(place: int) -> None:
    curves, new = trained([3.0, 2.9], [3.1, 3.0], []), [[0.1, 0.5, 0.1], [0.9, 0.5, 0.9]]
    curves.points[:] = [[0.5, 0.5, 0.5], [0.45, 0.5, 0.5], new[place]]

    chosen = FreezeThaw(3, NUM_RUNGS, 0).choose(curves, new, [1.0, 1.0], 1, able=[], running=[2])
    all_of_them = FreezeThaw(3, NUM_RUNGS, 0).choose(curves, new, [1.0, 1.0], 4, able=[1], running=[0, 2])

    assert chosen == [3 + (1 - place)]
    assert sorted(all_of_them) == [1, 3, 4]


def test_only_those_that_are_able_to_go_on() -> None:
    curves = spread(6, 2)

    chosen = FreezeThaw(3, NUM_RUNGS, 0).choose(curves, [], [], 4, able=[2, 5])

    assert sorted(chosen) == [2, 5]


def test_a_short_trial_has_finished_at_its_own_end() -> None:
    curves = spread(3, 2)
    curves.lengths.extend([2, NUM_RUNGS, NUM_RUNGS])

    assert sorted(FreezeThaw(3, NUM_RUNGS, 0).choose(curves, [], [], 3)) == [1, 2]


def test_with_a_finished_trial_nobody_goes_on_who_is_not_worth_it() -> None:
    flat = [[2.0, 1.9, 1.9, 1.9, 1.9], [2.5, 2.45, 2.45, 2.45], [2.6, 2.55, 2.55, 2.55]]
    close = [[2.0, 1.9, 1.9, 1.9, 1.9], [2.2, 2.0, 1.8], [2.6, 2.55, 2.55, 2.55]]

    assert FreezeThaw(3, NUM_RUNGS, 0).choose(trained(*flat), [], [], 2, worth=0.001) == []
    assert FreezeThaw(3, NUM_RUNGS, 0).choose(trained(*close), [], [], 2, worth=0.001) == [1]
    unfinished = [values[:4] for values in flat]
    assert FreezeThaw(3, NUM_RUNGS, 0).choose(trained(*unfinished), [], [], 2, worth=0.001) != []


def test_a_diverged_trial_counts_as_bad_and_spoils_nothing() -> None:
    curves = trained([3.0, 2.9], [3.1, 3.0], [3.05, math.inf], [2.95, math.inf])
    curves.points[:] = [[0.1, 0.5, 0.5], [0.2, 0.5, 0.5], [0.8, 0.5, 0.5], [0.9, 0.5, 0.5]]
    new = [[0.15, 0.5, 0.5], [0.85, 0.5, 0.5]]
    rules = [FreezeThaw(3, NUM_RUNGS, seed) for seed in range(5)]

    chosen = [rule.choose(curves, new, [0.5] * 2, 1, able=[]) for rule in rules]

    assert chosen == [[4]] * 5
    assert bool(rules[0].theta.isfinite().all())


def test_what_was_fitted_is_all_that_a_decision_takes_from_those_before() -> None:
    curves, new = spread(8, 3), np.random.default_rng(0).random((20, 3)).tolist()
    first = FreezeThaw(3, NUM_RUNGS, 0)
    first.choose(spread(5, 2), new, [1.0] * 20, SLOTS)
    again, other = FreezeThaw(3, NUM_RUNGS, 7), FreezeThaw(3, NUM_RUNGS, 7)
    again.recall(first.fitted)
    other.recall(FreezeThaw(4, NUM_RUNGS, 0).fitted)  # of another space

    chosen = again.choose(curves, new, [1.0] * 20, SLOTS)

    first.generator.manual_seed(7)
    assert chosen == first.choose(curves, new, [1.0] * 20, SLOTS)
    assert again.fitted == first.fitted
    assert other.num_fitted == 0


def test_beyond_a_number_of_cells_the_best_keep_their_curves_and_others_first_and_last() -> None:
    curves = spread(400, NUM_RUNGS)
    curves.values[399] = [math.nan, 9.0]

    cells = told_cells(curves)

    rungs = [[k for i, k, _ in cells if i == number] for number in range(400)]
    assert len(cells) <= MOST_CELLS
    assert rungs[:40] == [list(range(NUM_RUNGS))] * 40
    assert {tuple(found) for found in rungs[60:]} == {(), (0, NUM_RUNGS - 1)} | (
        {(1,)} if rungs[399] else set()
    )
    assert sum(map(bool, rungs[60:])) > 80
    assert len(told_cells(spread(20, NUM_RUNGS))) == 20 * NUM_RUNGS


@pytest.mark.parametrize(
    "values",
    [
        [[2.0], [2.0]],
        [[2.0, 2.0, 2.0], [2.0, 2.0], [2.0]],
        [[1e-6, 1e-6], [700.0, 700.0], [math.inf], [math.nan]],
        [[math.inf], [math.inf], [3.0], [math.nan, math.nan]],
        [[3.0 - 1e-9 * k for k in range(4)] for _ in range(30)],
        [[math.nan, 5.0, math.nan, 4.0]],
    ],
)
def test_odd_curves_lead_to_a_choice_all_the_same(values: list[list[float]]) -> None:
    curves, new = trained(*values), np.random.default_rng(0).random((20, 3)).tolist()
    curves.points[:] = [[0.5, 0.5, 0.5]] * len(values)
    rule = FreezeThaw(3, NUM_RUNGS, 0)

    for _ in range(3):
        chosen = rule.choose(curves, new, [1.0] * 20, SLOTS)
        rule.num_fitted = 0

    assert len(set(chosen)) == SLOTS
    assert bool(rule.theta.isfinite().all())


def test_a_covariance_that_is_singular_by_rounding_has_a_root() -> None:
    matrix = torch.ones(5, 5).double() - 1e-9 * torch.eye(5).double()

    root = root_of(matrix, 1e-12)

    np.testing.assert_allclose(root @ root.T, matrix, atol=1e-7)
