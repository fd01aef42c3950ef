"""`when(...)`: a key that some trials have, or search elsewhere, by the choice of another key."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from lora_search.engine.build import Room
from lora_search.errors import ConfigError
from lora_search.search.priors import first_points
from lora_search.settings.composition import compose
from lora_search.settings.range_ends import edge_notes
from lora_search.settings.schema import SamplerConfig, SweepConfig
from lora_search.settings.space import Space, corners, largest, parse_space, smallest
from lora_search.study.opening_checks import check_study

TARGETS = {"target_modules": "choice([q_proj,v_proj], all-linear)"}
LR = "when(lora.target_modules, [q_proj,v_proj], tag(log, interval(1e-4, 2e-3)), all-linear, {})"
SPACE = {
    "lora": TARGETS,
    "optim": {
        "lr": LR.format("tag(log, interval(5e-5, 1e-3))"),
        "schedule": "choice(cosine, wsd)",
        "decay_ratio": "when(optim.schedule, wsd, choice(0.1, 0.3))",
    },
}
QV = '["q_proj", "v_proj"]'


def config_with(**optim: str) -> SweepConfig:
    return SweepConfig(space={"lora": TARGETS, "optim": optim})


def keys_of(space: Space, **params: object) -> set[str]:
    return set(space.of({key.replace("__", "."): value for key, value in params.items()}))


def test_a_key_is_searched_for_some_choices_of_another() -> None:
    space = parse_space(SweepConfig(space=SPACE))

    assert set(space.distributions) == {"lora.target_modules", "optim.schedule"}
    always = {"lora.target_modules", "optim.schedule", "optim.lr"}
    assert keys_of(space, lora__target_modules=QV, optim__schedule="cosine") == always
    assert keys_of(space, lora__target_modules=QV, optim__schedule="wsd") == {*always, "optim.decay_ratio"}
    branches = space.conditions["optim.lr"].branches
    assert branches[QV] == FloatDistribution(1e-4, 2e-3, log=True)
    assert branches["all-linear"] == FloatDistribution(5e-5, 1e-3, log=True)
    assert space.conditions["optim.decay_ratio"].branches == {"wsd": CategoricalDistribution([0.1, 0.3])}


def test_it_is_typed_like_any_sweep() -> None:
    text = "when(optim.schedule, wsd, choice(0.1, 0.3))"

    config = compose("smoke", ["optim.schedule=choice(cosine,wsd)", f"optim.decay_ratio={text}"])

    assert config.space["optim"]["decay_ratio"] == text
    assert list(parse_space(config).parents) == ["optim.decay_ratio"]


def test_the_first_trial_has_the_settings_that_its_choices_ask_for() -> None:
    config = SweepConfig(space=SPACE)
    default = {"lora.target_modules": QV, "optim.schedule": "cosine", "optim.lr": config.optim.lr}

    assert parse_space(config).default_params(config) == default
    rates = [point["optim.lr"] for point in first_points(config, parse_space(config), 4096)]
    assert all(1e-4 <= rate <= 2e-3 for rate in rates), rates  # the range of q and v
    assert len(rates) > 1

    config.optim.schedule = "wsd"  # whose decay_ratio of 0.2 is not among the choices
    assert parse_space(config).outside(config) == {"optim.decay_ratio": 0.2}


def test_points_are_those_of_every_choice_with_its_own_keys() -> None:
    config = SweepConfig(
        space={
            "optim": {"schedule": "choice(cosine, wsd)", "decay_ratio": SPACE["optim"]["decay_ratio"]},
            "train": {"epochs": "range(1, 3)"},
        },
        sampler=SamplerConfig(name="grid"),
    )
    space = parse_space(config)

    points = space.untried([])

    assert space.num_points == 6  # epochs, and for wsd twice as many
    assert points is not None
    assert {frozenset(point) for point in points} == {
        frozenset({"optim.schedule", "train.epochs"}),
        frozenset({"optim.schedule", "train.epochs", "optim.decay_ratio"}),
    }
    assert space.untried(points[1:]) == points[:1]


def test_the_engine_has_room_for_what_some_trials_have() -> None:
    text = "when(lora.target_modules, [q_proj,v_proj], range(32, 65, 32))"
    config = SweepConfig(space={"lora": {**TARGETS, "r": text}, "train": {"batch_size": "choice(2, 4)"}})
    space = parse_space(config)

    assert Room.of_space(config, space).max_rank == 64
    assert (smallest(config, space, "lora.r"), largest(config, space, "lora.r")) == (config.lora.r, 64)
    pairs = {(s.target_modules, s.r) for s in corners(config, space, ["lora.r"])}
    assert pairs == {(("q_proj", "v_proj"), 32), (("q_proj", "v_proj"), 64), (("all-linear",), config.lora.r)}


def test_an_edge_is_said_with_an_override_that_keeps_the_other_ranges() -> None:
    config = SweepConfig(space=SPACE)
    params = {"lora.target_modules": "all-linear", "optim.schedule": "cosine", "optim.lr": 9.9e-4}

    [(_, quoted)] = edge_notes(config, parse_space(config), params)

    override = quoted.removeprefix("'space.optim.lr=").removesuffix("'")
    wider = parse_space(config_with(lr=override)).conditions["optim.lr"].branches
    assert wider[QV] == FloatDistribution(1e-4, 2e-3, log=True)
    assert wider["all-linear"].high > 1e-3  # type: ignore[attr-defined]


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("when()", "is not in the sweep grammar .*missing a required argument"),
        ("when(lora.target_modules)", r"must pair choices and sweeps.* Write when\(lora.target_modules, "),
        ("when(lora.target_modules, all-linear)", "must pair choices and sweeps"),
        ("when(lora.r, 8, interval(1e-5, 1e-3))", r"searched by choice\(...\), got 'lora.r'. Search lora.r"),
        ("when(optim.eps, 8, interval(1e-5, 1e-3))", r"must depend on a key .* Search optim.eps by choice"),
        (
            "when(lora.target_modules, [k_proj], interval(1e-5, 1e-3))",
            r"must be a choice of lora.target_modules: .* \"v_proj\"\], all-linear, got \['k_proj'\]",
        ),
        (
            "when(lora.target_modules, all-linear, choice(1e-5), all-linear, choice(1e-4))",
            "the choices must differ, got 'all-linear'. Remove the repeated one",
        ),
        ("when(lora.target_modules, all-linear, 1e-5)", r"must be a sweep.* Write choice\(1e-05\)"),
        ("when(lora.target_modules, all-linear, when(lora.r, 8, choice(1)))", "must be a sweep"),
        ("when(lora.target_modules, all-linear, interval(1, 1e-5))", "low < high must hold"),
        ("when(lora.target_modules, all-linear, choice(20))", "must be between 0 and 1, got 20"),
        (
            "when(lora.target_modules, choice(all-linear), choice(1e-5))",
            "must have a choice of lora.target_modules, not a sweep, before each sweep, got 'when.* Write",
        ),
        (
            "when(lora.target_modules, [v_proj,q_proj], choice(1e-5))",
            r"got \['v_proj', 'q_proj'\]. Write it as it is there; a list in the same order",
        ),
        (
            "when(lora.target_module, all-linear, choice(1e-5))",
            "got 'lora.target_module'. Did you mean lora.target_modules?",
        ),
        ("when(engine.slots, 1, choice(1e-5))", "got 'engine.slots'. Keys of lora, optim and train can be"),
        (
            "when(null, 1, choice(1e-5))",
            r"must begin with the name of a searched key, got 'when\(null.* Write",
        ),
        ("when(optim.lr, 1e-5, choice(1e-5))", "cannot depend on itself, got 'optim.lr'. Name another"),
        (LR.format("interval(1e-5, 1e-3)"), r"its sweeps must be of one kind.* Write interval\(...\)"),
        (LR.format("choice(1e-5)"), "its sweeps must be of one kind, with the same choices"),
    ],
)
def test_a_wrong_condition_is_one_message(expression: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_space(config_with(lr=expression))

    assert str(caught.value).startswith("space.optim.lr: ")
    assert "\n" not in str(caught.value)


def test_a_choice_is_the_parents_own_however_its_number_is_written() -> None:
    lora = {"r": "choice(8, 16)", "use_rslora": "choice(true, false)"}
    space = {"lora": lora, "optim": {"lr": "when(lora.r, 8.0, choice(1e-4))"}}

    [choice] = parse_space(SweepConfig(space=space)).conditions["optim.lr"].branches

    assert (choice, type(choice)) == (8, int)
    space["optim"] = {"lr": "when(lora.use_rslora, 1, choice(1e-4))"}
    with pytest.raises(
        ConfigError, match="must be a choice of lora.use_rslora: True, False, got 1. Write it"
    ):
        parse_space(SweepConfig(space=space))


@pytest.mark.wrong_input
@pytest.mark.parametrize("sampler", ["gp", "cmaes", "qmc"])
def test_samplers_that_know_no_conditions_are_refused(sampler: str) -> None:
    config = SweepConfig(space=SPACE, sampler=SamplerConfig(name=sampler))

    with pytest.raises(ConfigError) as caught:
        check_study(config, parse_space(config))

    assert str(caught.value) == (
        "sampler.name: cannot search keys that depend on others (optim.decay_ratio, optim.lr), "
        f"got '{sampler}'. Use sampler=tpe, random or grid"
    )


@pytest.mark.wrong_input
def test_a_setting_of_one_schedule_is_not_searched_for_another() -> None:
    text = "when(optim.schedule, cosine, choice(0.1, 0.2))"
    config = config_with(schedule="choice(cosine, wsd)", decay_ratio=text)

    with pytest.raises(ConfigError, match="optim.decay_ratio: has no effect with optim.schedule=cosine, got"):
        parse_space(config)

    both = "when(optim.schedule, wsd, choice(0.1, 0.2), cosine, choice(0.1, 0.2))"
    config = config_with(schedule="choice(cosine, wsd)", decay_ratio=both)
    with pytest.raises(ConfigError, match=r"with optim.schedule=cosine, got .* Leave cosine out of when\("):
        parse_space(config)


@pytest.mark.wrong_input
def test_a_grid_needs_values_that_can_be_counted_in_every_branch() -> None:
    config = SweepConfig(space=SPACE, sampler=SamplerConfig(name="grid"))

    with pytest.raises(ConfigError, match="space.optim.lr: a grid needs values that can be counted"):
        parse_space(config)
