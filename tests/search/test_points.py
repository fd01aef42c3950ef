"""Settings as points of the unit cube, and random settings that were not tried."""

import math
from collections.abc import Mapping

import numpy as np
import pytest

from lora_search.search.points import Axes, draw, untried
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import Space, parse_space

RATES = "tag(log, interval(1e-4, 1e-2))"
MIXED = {
    "lora": {"r": "choice(8, 64, 16)", "target_modules": "choice(all-linear, [q_proj, v_proj], [q_proj])"},
    "optim": {
        "lr": RATES,
        "schedule": "choice(wsd, linear)",
        "decay_ratio": "when(optim.schedule, wsd, interval(0.1, 0.5))",
        "weight_decay": "range(0, 0.1, 0.05)",
    },
    "train": {"batch_size": "range(1, 5)", "epochs": "choice(2)"},
}


def space_of(tree: Mapping[str, object]) -> Space:
    return parse_space(SweepConfig(space=dict(tree)))


def place(tree: Mapping[str, object], **params: object) -> list[float]:
    return Axes(space_of(tree)).point({key.replace("__", "."): value for key, value in params.items()})


def test_a_log_range_is_even_in_the_logarithm_and_ends_hold_what_lies_beyond() -> None:
    tree = {"optim": {"lr": RATES}}

    places = [place(tree, optim__lr=lr)[0] for lr in (1e-4, 1e-3, 1e-2, 1e-5, 1.0, 0)]

    assert places == pytest.approx([0, 0.5, 1, 0, 1, 0])


def test_numbers_have_places_by_rank_and_one_that_is_no_choice_lies_between_them() -> None:
    tree = {"lora": {"r": "choice(64, 8, 16)"}}

    places = [place(tree, lora__r=r)[0] for r in (8, 16, 64, 8.0, 40, 128)]

    assert places == [0, 0.5, 1, 0, 0.75, 1]


def test_choices_without_an_order_are_all_equally_far_from_each_other() -> None:
    tree = {"optim": {"schedule": "choice(cosine, linear, constant)"}}

    places = [place(tree, optim__schedule=name) for name in ("cosine", "linear", "constant", "another")]

    assert places == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_a_key_that_only_some_trials_have_is_measured_over_all_its_branches() -> None:
    branches = f"when(optim.schedule, linear, {RATES}, constant, tag(log, interval(1e-3, 1e-1)))"
    tree = {"optim": {"schedule": "choice(linear, constant, cosine)", "lr": branches}}

    rates = [place(tree, optim__schedule=name, optim__lr=1e-3)[-1] for name in ("linear", "constant")] + [
        place(tree, optim__schedule="cosine")[-1]
    ]

    assert rates == pytest.approx([1 / 3, 1 / 3, 0.5])


def test_a_key_with_one_value_is_no_axis() -> None:
    assert len(Axes(space_of(MIXED)).point({})) == 1 + 3 + 1 + 2 + 1 + 1 + 1  # all but train.epochs


def test_a_widened_range_keeps_the_trials_that_it_had() -> None:
    before, after = {"optim": {"lr": RATES}}, {"optim": {"lr": "tag(log, interval(1e-6, 1e-2))"}}

    assert place(before, optim__lr=1e-4) == [0]
    assert place(after, optim__lr=1e-4) == pytest.approx([0.5])


def test_every_draw_is_in_the_space_and_all_values_come() -> None:
    space, rng = space_of(MIXED), np.random.default_rng(0)

    drawn = [draw(space, rng) for _ in range(400)]

    assert {space.refusal(params) for params in drawn} == {""}
    assert {params["train.batch_size"] for params in drawn} == {1, 2, 3, 4}
    assert {params["optim.weight_decay"] for params in drawn} == {0, 0.05}
    assert {params["lora.r"] for params in drawn} == {8, 16, 64}
    assert all(("optim.decay_ratio" in p) == (p["optim.schedule"] == "wsd") for p in drawn)
    rates = sorted(math.log10(p["optim.lr"]) for p in drawn)  # type: ignore[arg-type]
    assert np.quantile(rates, [0.25, 0.5, 0.75]) == pytest.approx([-3.5, -3, -2.5], abs=0.15)


def test_what_was_tried_is_not_drawn_again_until_nothing_is_left() -> None:
    space = space_of({"lora": {"r": "choice(8, 16, 32)"}, "train": {"batch_size": "choice(4, 8)"}})
    tried: list[dict[str, object]] = []
    for number in range(6):
        found = untried(space, 3, tried, np.random.default_rng(number))
        assert found
        assert all(point not in tried for point in found)
        tried.append(found[0])

    assert untried(space, 3, tried, np.random.default_rng(7)) == []
