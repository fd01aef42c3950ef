"""A winner at the edge of its range is said, with an override that the same study takes."""

import re

import pytest
from optuna.distributions import FloatDistribution

from lora_search.settings.edges import edge_notes
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import parse_space

SPACE = {
    "lora": {"r": "choice(8, 16, 32)", "dropout": "interval(0, 0.1)"},
    "optim": {"lr": "tag(log, interval(2e-5, 5e-5))"},
    "train": {"epochs": "interval(1, 5)", "batch_size": "choice(2, 4, 6)"},
}
INSIDE = {"lora.r": 16, "lora.dropout": 0.05, "optim.lr": 3e-5, "train.epochs": 3, "train.batch_size": 4}


def notes(**changes: float) -> list[str]:
    config = SweepConfig(space=SPACE)
    params = {**INSIDE, **{key.replace("__", "."): value for key, value in changes.items()}}
    return edge_notes(config, parse_space(config), params)


def test_a_winner_inside_is_no_news() -> None:
    assert notes() == []


def test_the_override_for_a_learning_rate_at_its_upper_end_widens_the_range() -> None:
    [note] = notes(optim__lr=4.9e-5)

    override = re.search(r"'space\.optim\.lr=(.*)'", note)
    assert override is not None
    wider = parse_space(SweepConfig(space={"optim": {"lr": override[1]}})).distributions["optim.lr"]
    assert isinstance(wider, FloatDistribution)
    assert (wider.low, wider.log) == (2e-5, True)
    assert wider.high > 5e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora__r": 32}, r"lora.r=32 is the largest choice.*'space.lora.r=choice\(8,16,32,64\)'"),
        ({"lora__r": 8}, r"lora.r=8 is the smallest choice.*'space.lora.r=choice\(4,8,16,32\)'"),
        ({"train__batch_size": 2}, r"'space.train.batch_size=choice\(1,2,4,6\)'"),
        ({"train__batch_size": 6}, r"'space.train.batch_size=choice\(2,4,6,8\)'"),
        ({"train__epochs": 5}, r"space.train.epochs=interval\(1,7\)"),
    ],
)
def test_other_edges_are_said_too(changes: dict[str, float], said: str) -> None:
    [note] = notes(**changes)

    assert re.search(said, note)


@pytest.mark.parametrize("changes", [{"lora__dropout": 0.0}, {"train__epochs": 1}])
def test_an_end_beyond_which_nothing_is_allowed_is_no_edge(changes: dict[str, float]) -> None:
    assert notes(**changes) == []
