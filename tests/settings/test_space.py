import itertools

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lora_search.engine.build import Room
from lora_search.errors import ConfigError
from lora_search.settings.overlay import trial_settings
from lora_search.settings.schema import SamplerConfig, StudyConfig, SweepConfig
from lora_search.settings.space import largest, parse_space

MIXED = {
    "lora": {"r": "choice(8, 16)", "target_modules": "choice([q_proj,v_proj], all-linear)"},
    "optim": {"lr": "tag(log, interval(1e-5, 1e-3))", "warmup_ratio": "interval(0, 0.2)"},
    "train": {"batch_size": "range(4, 17, 4)", "epochs": "interval(3, 5)"},
}


def config_with(key: str, expression: object) -> SweepConfig:
    section, _, name = key.partition(".")
    return SweepConfig(space={section: {name: expression}})


def test_every_kind_of_sweep_becomes_its_distribution() -> None:
    config = SweepConfig(space=MIXED)

    space = parse_space(config)

    assert space.distributions == {
        "lora.r": CategoricalDistribution([8, 16]),
        "lora.target_modules": CategoricalDistribution(['["q_proj", "v_proj"]', "all-linear"]),
        "optim.lr": FloatDistribution(1e-5, 1e-3, log=True),
        "optim.warmup_ratio": FloatDistribution(0.0, 0.2),
        "train.batch_size": IntDistribution(4, 16, step=4),
        "train.epochs": IntDistribution(3, 5),
    }
    room = Room.of_space(config, space)
    assert room.targets == (("q_proj", "v_proj"), ("all-linear",))
    assert room.max_rank == 16
    assert largest(config, space, "train.epochs") == 5
    assert largest(config, space, "train.evals_per_epoch") == 4


@pytest.mark.parametrize(
    ("key", "expression", "distribution"),
    [
        ("lora.r", "8,16", CategoricalDistribution([8, 16])),
        ("lora.r", "tag(log, interval(4, 64))", IntDistribution(4, 64, log=True)),
        ("lora.r", "range(8, 32, 8)", IntDistribution(8, 24, step=8)),
        ("lora.r", "range(8, 33, 8)", IntDistribution(8, 32, step=8)),
        ("lora.alpha", "choice(r, 2r, 32)", CategoricalDistribution(["r", "2r", 32])),
        ("lora.alpha", "tag(int, interval(8, 64))", IntDistribution(8, 64)),
        ("lora.use_rslora", "choice(true, false)", CategoricalDistribution([True, False])),
        ("lora.dropout", "range(0.0, 0.2, 0.05)", FloatDistribution(0.0, 0.15, step=0.05)),
        ("optim.schedule", "choice('cosine', \"linear\")", CategoricalDistribution(["cosine", "linear"])),
        ("optim.lr", "choice(1e-4, 3e-4)", CategoricalDistribution([1e-4, 3e-4])),
        ("train.early_stopping_patience", "interval(2, 4)", IntDistribution(2, 4)),
    ],
)
def test_numbers_take_the_type_of_their_key(
    key: str, expression: str, distribution: optuna.distributions.BaseDistribution
) -> None:
    assert parse_space(config_with(key, expression)).distributions == {key: distribution}


def test_null_and_absent_keys_are_not_searched() -> None:
    config = SweepConfig(space={"lora": {"r": None, "dropout": "choice(0.0, 0.1)"}, "optim": {}})

    assert list(parse_space(config).distributions) == ["lora.dropout"]


def test_a_trial_lays_its_parameters_over_the_settings_of_the_sweep() -> None:
    config = SweepConfig(space=MIXED)

    params = {"lora.r": 8, "lora.target_modules": '["q_proj", "v_proj"]', "train.batch_size": 12}
    settings = trial_settings(config, params)

    assert (settings.r, settings.batch_size, settings.lr) == (8, 12, config.optim.lr)
    assert settings.target_modules == ("q_proj", "v_proj")
    assert trial_settings(config, {"lora.target_modules": "all-linear"}).target_modules == ("all-linear",)
    assert config.lora.r == 16


@pytest.mark.parametrize(("alpha", "expected"), [("2r", 64.0), ("r", 32.0), ("0.5r", 16.0), (24, 24.0)])
def test_alpha_is_tied_to_the_rank_or_a_number_of_its_own(alpha: object, expected: float) -> None:
    assert trial_settings(SweepConfig(space=MIXED), {"lora.r": 32, "lora.alpha": alpha}).alpha == expected


def test_the_default_point_is_offered_only_inside_the_space() -> None:
    mixed, outside = SweepConfig(space=MIXED), config_with("lora.r", "choice(4, 8)")

    assert parse_space(mixed).default_params(mixed) == {
        "lora.r": 16, "lora.target_modules": '["q_proj", "v_proj"]', "optim.lr": 2e-4,
        "optim.warmup_ratio": 0.05, "train.batch_size": 8, "train.epochs": 3,
    }  # fmt: skip
    assert parse_space(outside).default_params(outside) is None


def test_the_points_of_a_countable_space_are_counted_and_crossed_off() -> None:
    countable = SweepConfig(
        space={
            "lora": {"r": "choice(8, 16)", "dropout": "range(0.0, 0.3, 0.1)"},
            "train": {"epochs": "range(1, 3)"},
        }
    )
    space = parse_space(countable)
    points = [
        {"lora.dropout": dropout, "lora.r": r, "train.epochs": epochs}
        for dropout, r, epochs in itertools.product((0.0, 0.1, 0.2), (8, 16), (1, 2))
    ]

    untried = space.untried([])

    assert space.num_points == 12
    assert untried == [pytest.approx(point) for point in points]
    assert space.untried(points[:-1]) == [pytest.approx(points[-1])]
    assert parse_space(SweepConfig(space=MIXED)).num_points is None
    assert parse_space(SweepConfig(space=MIXED)).untried([]) is None


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("key", "expression", "message"),
    [
        (
            "lora.r",
            "interval(64, 8)",
            "space.lora.r: low < high must hold, got 'low=64.0, high=8.0'. Swap them or",
        ),
        ("lora.r", "interval(8, 8)", "low < high must hold"),
        ("optim.lr", "interval(1e400, 1)", "low < high must hold"),
        ("lora.r", "interval(4.5, 8)", "the bounds must be whole numbers"),
        ("lora.r", "interval(0, 8)", "space.lora.r: must be in \\[1, 4096\\], got 0. Try 8, 16 or 32"),
        ("lora.r", "choice(0, 8)", "space.lora.r: must be in \\[1, 4096\\], got 0"),
        ("lora.r", "choice(8, 8)", "the choices must differ"),
        ("lora.r", "choice(a, b)", "space.lora.r: must be of type int, got 'a'"),
        ("lora.r", "choice(true, 8)", "must be of type int, got True"),
        ("lora.r", "choice(8.5, 9)", "must be of type int, got 8.5"),
        ("lora.r", "choice()", "empty choice is not legal"),
        ("lora.r", "choice(8", "is not in the sweep grammar"),
        ("lora.r", "choise(8, 16)", "Unknown function 'choise'"),
        ("lora.r", "interval(1)", "missing a required argument"),
        (
            "lora.r",
            "16",
            r"must be a sweep, got '16'. Write choice\(16\), or put a fixed value at lora.r itself",
        ),
        ("lora.r", 16, r"must be a sweep, got 16. Write choice\(16\), or put a fixed value at lora.r itself"),
        ("lora.r", [8, 16], r"must be a sweep, got \[8, 16\]. Write choice\(8, 16\)"),
        ("lora.r", '"choice(8, 16)"', "Take one pair of quotes off"),
        ("lora.r", "tag(log, choice(8, 16))", r"tags belong to interval\(...\) only"),
        ("lora.r", "tag(exp, interval(8, 16))", "the tags of a sweep are log and int"),
        ("lora.r", "range(8, 32, 0)", "the step must be > 0"),
        ("lora.r", "range(8, 32, nan)", "the step must be > 0, got nan"),
        ("lora.r", "range(8, 32, 0.5)", "must be of type int|the step must be a whole number"),
        ("lora.r", "glob(*)", r"must be a sweep, got 'glob\(\*\)'. Write choice\(8, 16\), interval"),
        ("lora.rank", "choice(8, 16)", "is not a setting that can be searched.*Did you mean space.lora.r"),
        ("lora.lr", "choice(1e-4, 1e-3)", "Did you mean space.optim.lr"),
        (
            "lora.alpha",
            "choice(2x, r)",
            "space.lora.alpha: must be a number > 0 or a multiple of r, got '2x'",
        ),
        ("lora.alpha", "choice([1, 2], r)", "must be of type int or float or str"),
        ("lora.dropout", "interval(0, 1.5)", r"space.lora.dropout: must be in \[0, 1\), got 1.5"),
        (
            "lora.target_modules",
            "choice(q_proj, all-linear)",
            "must be a list of layer names, all-linear or a regular expression",
        ),
        (
            "lora.target_modules",
            "choice([])",
            "must be a list of layer names, all-linear or a regular expression",
        ),
        (
            "lora.target_modules",
            "interval(1, 2)",
            "must be a list of layer names, all-linear or a regular expression",
        ),
        ("optim.lr", "tag(log, interval(0, 1e-3))", "a log range must start above 0, got 0.0"),
        ("optim.lr", "interval(1e-5, 2)", "space.optim.lr: must be between 0 and 1, got 2.0"),
        ("optim.schedule", "choice(cosine, zigzag)", "space.optim.schedule: must be one of cosine, linear"),
        ("optim.schedule", "interval(1, 2)", "must be of type str"),
        (
            "train.evals_per_epoch",
            "choice(1, 2)",
            "cannot be searched.*All trials must meet at the same rungs",
        ),
        ("engine.slots", "choice(1, 2)", "is not a setting that can be searched"),
    ],
)
def test_a_wrong_space_is_one_clear_message(key: str, expression: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_space(config_with(key, expression))

    assert str(caught.value).startswith(f"space.{key}: ")
    assert "\n" not in str(caught.value)


def test_a_sweep_of_several_trials_must_search_something() -> None:
    with pytest.raises(ConfigError, match="space: must search something when study.n_trials is above 1"):
        parse_space(SweepConfig())

    assert parse_space(SweepConfig(study=StudyConfig(n_trials=1))).distributions == {}


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"optim": {"lr": "interval(1e-5, 1e-3)"}},
            r"space.optim.lr: a grid needs values .*choice\(...\) or range",
        ),
        (
            {"lora": {"r": "interval(1, 500)"}, "train": {"batch_size": "interval(1, 500)"}},
            "takes up to 10000",
        ),
    ],
)
def test_a_grid_needs_a_space_that_can_be_counted(space: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_space(SweepConfig(space=space, sampler=SamplerConfig(name="grid")))
