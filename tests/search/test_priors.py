"""Where a search begins."""

import pytest

from lora_search.search.priors import first_points
from lora_search.settings.schema import OptimConfig, StudyConfig, SweepConfig
from lora_search.settings.space import parse_space

WIDE = "tag(log, interval(1e-5, 1e-2))"
WIDTH_OF_8B = 4096  # its prior is 2.9e-4


def rates(lr: str, own: float, *, width: float | None = WIDTH_OF_8B, **study: object) -> list[object]:
    """Return the learning rates of the first trials where the settings outside `space` have this one."""
    space = {"optim": {"lr": lr}, "lora": {"r": "choice(8, 16)"}}
    config = SweepConfig(study=StudyConfig(**study), optim=OptimConfig(lr=own), space=space)  # type: ignore[arg-type]
    return [point["optim.lr"] for point in first_points(config, parse_space(config), width)]


@pytest.mark.parametrize(
    ("lr", "own", "expected"),
    [
        (WIDE, 2e-5, [2e-5, 2.9e-4, 8.6e-4, 9.5e-5]),
        (WIDE, 3e-4, [3e-4, 8.6e-4, 9.5e-5]),  # one's own stands for the middle
        ("tag(log, interval(2e-5, 5e-5))", 3e-5, [3e-5, 5e-5]),  # never outside; the three are one
        ("tag(log, interval(1e-3, 1e-2))", 5e-3, [5e-3, 1e-3]),
        ("choice(1e-4, 2e-4, 1e-3)", 2e-4, [2e-4, 1e-3, 1e-4]),
        ("range(1e-4, 1e-3, 2e-4)", 1e-4, [1e-4, pytest.approx(3e-4), pytest.approx(9e-4)]),
    ],
)
def test_learning_rates_around_the_prior_are_tried_first_inside_the_range(
    lr: str, own: float, expected: list[float]
) -> None:
    assert rates(lr, own) == expected


def test_no_more_points_are_put_in_line_than_there_are_trials() -> None:
    assert rates(WIDE, 2e-5, n_trials=1) == [2e-5]
    assert rates(WIDE, 2e-5, n_trials=2) == [2e-5, 2.9e-4]


def test_each_of_the_two_ways_to_begin_can_be_switched_off() -> None:
    assert rates(WIDE, 2e-5, first_trials=False) == [2e-5]
    assert rates(WIDE, 2e-5, first_trial_is_default=False) == [2.9e-4, 8.6e-4, 9.5e-5]
    assert rates(WIDE, 2e-5, first_trials=False, first_trial_is_default=False) == []
    assert rates(WIDE, 2e-5, width=None) == [2e-5]


def test_a_setting_outside_its_range_is_left_to_the_sampler() -> None:
    space = {"optim": {"lr": WIDE}, "lora": {"r": "choice(4, 8)"}, "train": {"batch_size": "choice(4, 8)"}}
    config = SweepConfig(space=space)  # its own rank is 16

    points = first_points(config, parse_space(config), WIDTH_OF_8B)

    assert [set(point) for point in points] == [{"optim.lr", "train.batch_size"}] * 3


def test_a_fixed_learning_rate_is_kept() -> None:
    config = SweepConfig(space={"lora": {"r": "choice(8, 16)"}})

    assert first_points(config, parse_space(config), WIDTH_OF_8B) == [{"lora.r": 16}]
