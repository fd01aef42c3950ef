"""A winner at the edge of its range is said, with an override that the same study takes."""

import re
import shlex
from itertools import permutations

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lora_search.settings.composition import compose
from lora_search.settings.range_ends import edge_notes
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import parse_space
from lora_search.study.fingerprint import check_fingerprint, space_part

SPACE = {
    "lora": {"r": "choice(8, 16, 32)", "dropout": "interval(0, 0.1)"},
    "optim": {"lr": "tag(log, interval(2e-5, 5e-5))"},
    "train": {"epochs": "interval(1, 5)", "batch_size": "choice(2, 4, 6)"},
}
INSIDE = {"lora.r": 16, "lora.dropout": 0.05, "optim.lr": 3e-5, "train.epochs": 3, "train.batch_size": 4}


def notes(**changes: float) -> list[str]:
    config = SweepConfig(space=SPACE)
    params = {**INSIDE, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [f"{text}: {override}" for text, override in edge_notes(config, parse_space(config), params)]


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


@pytest.mark.parametrize(
    ("key", "sweep", "best", "wider"),
    [
        ("lora.r", "range(16,65,8)", 64, "range(16,96,8)"),
        ("lora.r", "range(16,65,8)", 16, "range(8,72,8)"),  # not 0 or below
        ("lora.dropout", "range(0.1,0.3,0.05)", 0.25, "range(0.1,0.4,0.05)"),
    ],
)
def test_a_stepped_range_is_widened_by_whole_steps(key: str, sweep: str, best: float, wider: str) -> None:
    section, name = key.split(".")
    config = SweepConfig(space={section: {name: sweep}})

    [(text, override)] = edge_notes(config, parse_space(config), {key: best})

    assert shlex.split(override) == [f"space.{key}={wider}"]
    assert "end of its range" in text


def test_no_choice_is_said_to_be_smaller_that_is_not() -> None:
    config = SweepConfig(space={"optim": {"warmup_steps": "choice(0, 4, 8)"}})

    assert edge_notes(config, parse_space(config), {"optim.warmup_steps": 0}) == []


PARENTS: dict[str, list[tuple[str, object]]] = {  # key -> choices, as typed and as kept
    "optim.schedule": [("cosine", "cosine"), ("wsd", "wsd")],
    "lora.use_dora": [("true", True), ("false", False)],
    "lora.init": [("olora", "olora"), ("kaiming", "kaiming")],
    "lora.target_modules": [
        ("'.*[.][qk]_proj'", ".*[.][qk]_proj"), (r"'(q|it\'s)_proj'", "(q|it's)_proj"),
        ("[q_proj,v_proj]", '["q_proj", "v_proj"]'),
    ],
    "lora.rank_pattern": [
        ("{q_proj:32}", '{"q_proj": 32}'), (r"{.*\[.\]v_proj:4,k_proj:8}", '{".*[.]v_proj": 4, "k_proj": 8}'),
    ],
}  # fmt: skip
CASES = [  # key, its sweep for the winner's choice, and for the other one
    ("optim.min_lr_ratio", "choice(0.1,0.2)", "choice(0.1,0.2)"),
    ("optim.min_lr_ratio", "interval(0.1,0.2)", "range(0.1,0.4,0.1)"),
    ("optim.lora_plus_ratio", "tag(int,interval(4,8))", "range(1,9,1)"),
    ("optim.lora_plus_ratio", "range(4,9,1)", "range(1,9,2)"),
    ("optim.lora_plus_ratio", "tag(int,log,interval(4,8))", "tag(log,int,interval(4,16))"),
    ("optim.lora_plus_ratio", "choice(1.5,4,8)", "choice(1.5,4,8)"),
    ("optim.lr", "tag(log,interval(1e-5,1e-4))", "tag(log,interval(2e-5,1e-3))"),
    ("lora.r", "interval(4,16)", "range(8,33,8)"),
    ("lora.r", "range(16,65,8)", "interval(4,16)"),
    ("lora.r", "choice(8,16)", "choice(8,16)"),
    ("train.neftune_alpha", "interval(3,5)", "range(1.0,5.0,1.0)"),
    ("train.neftune_alpha", "range(2.5,4.5,0.5)", "interval(3,5)"),
]


def ends_of(distribution: BaseDistribution) -> tuple[float, float]:
    if isinstance(distribution, CategoricalDistribution):
        return min(distribution.choices), max(distribution.choices)  # type: ignore[type-var,return-value]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low, distribution.high


def advised(typed: list[str], key: str, params: dict[str, object], is_high: bool) -> list[str]:
    """Return what the override advised for a winner at an end of the key's range changes in its study."""
    config = compose("smoke", typed)
    space = parse_space(config)
    best = {**params, key: ends_of(space.of(params)[key])[is_high]}
    [(_, override)] = edge_notes(config, space, best)
    [word] = shlex.split(override)
    wider = parse_space(compose("smoke", [*typed, word]))
    assert space.refusal(best) == wider.refusal(best) == ""
    assert ends_of(wider.of(params)[key])[is_high] != best[key]
    return check_fingerprint("smoke", space_part(space), space_part(wider))


@pytest.mark.parametrize(("key", "sweep"), sorted({case[:2] for case in CASES}))
@pytest.mark.parametrize("is_high", [True, False])
def test_every_override_that_is_advised_widens_the_range_of_the_study(
    key: str, sweep: str, is_high: bool
) -> None:
    [change] = advised([f"{key}={sweep}"], key, {}, is_high)

    assert change.startswith(f"space.{key}: ")


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    case=st.sampled_from(CASES),
    choices=st.sampled_from(
        [(name, *pair) for name, two in PARENTS.items() for pair in permutations(two, 2)]
    ),
    is_high=st.booleans(),
)
@example(case=CASES[0], choices=("optim.schedule", *PARENTS["optim.schedule"]), is_high=True)
@example(case=CASES[2], choices=("lora.rank_pattern", *PARENTS["lora.rank_pattern"]), is_high=True)
@example(case=CASES[7], choices=("lora.target_modules", *PARENTS["lora.target_modules"][:2]), is_high=True)
def test_so_does_that_of_a_key_that_depends_on_another(
    case: tuple[str, str, str], choices: tuple[str, tuple[str, object], tuple[str, object]], is_high: bool
) -> None:
    (key, sweep, other), (parent, (mine, kept), (rest, _)) = case, choices
    typed = [f"{parent}=choice({mine},{rest})", f"{key}=when({parent}, {mine}, {sweep}, {rest}, {other})"]

    changes = advised(typed, key, {parent: kept}, is_high)

    assert any(text.startswith(f"space.{key}[{parent}={kept}]: ") for text in changes), changes
    assert len(changes) == (2 if sweep.startswith("choice") else 1)  # the choices of all are the same
