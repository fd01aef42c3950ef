import optuna
import pytest

from lora_search.config import SweepConfig
from lora_search.errors import ConfigError
from lora_search.space import largest, parse_space, possible_targets, trial_settings


def config_with(section: str, **space: object) -> SweepConfig:
    return SweepConfig(space={section: space})


def test_every_kind_of_sweep_becomes_its_distribution() -> None:
    config = SweepConfig(
        space={
            "lora": {"r": "choice(8, 16)", "target_modules": "choice([q_proj,v_proj], all-linear)"},
            "optim": {"lr": "tag(log, interval(1e-5, 1e-3))", "warmup_ratio": "interval(0, 0.2)"},
            "train": {"batch_size": "range(4, 17, 4)", "epochs": "interval(3, 5)"},
        }
    )

    space = parse_space(config)

    assert space.distributions == {
        "lora.r": optuna.distributions.CategoricalDistribution([8, 16]),
        "lora.target_modules": optuna.distributions.CategoricalDistribution(
            ['["q_proj", "v_proj"]', "all-linear"]
        ),
        "optim.lr": optuna.distributions.FloatDistribution(1e-5, 1e-3, log=True),
        "optim.warmup_ratio": optuna.distributions.FloatDistribution(0.0, 0.2),
        "train.batch_size": optuna.distributions.IntDistribution(4, 16, step=4),
        "train.epochs": optuna.distributions.IntDistribution(3, 5),
    }
    assert possible_targets(config, space) == [("q_proj", "v_proj"), ("all-linear",)]
    assert largest(config, space, "lora.r") == 16


def test_alpha_stays_tied_to_a_searched_rank() -> None:
    config = config_with("lora", r="choice(8, 32)")

    assert trial_settings(config, {"lora.r": 32}).alpha == 64.0


def test_the_default_point_is_offered_only_inside_the_space() -> None:
    inside, outside = config_with("lora", r="choice(8, 16)"), config_with("lora", r="choice(4, 8)")

    assert parse_space(inside).default_params(inside) == {"lora.r": 16}
    assert parse_space(outside).default_params(outside) is None


@pytest.mark.parametrize(
    ("section", "name", "expression", "message"),
    [
        (
            "lora",
            "r",
            "interval(64, 8)",
            "space.lora.r: low < high must hold, got 'low=64.0, high=8.0'. Swap them",
        ),
        ("lora", "r", "choice(0, 8)", "must be at least 1"),
        ("lora", "r", "choice(8, 8)", "the choices must differ"),
        ("lora", "r", "choice(a, b)", "space.lora.r"),
        ("lora", "r", "16", "must be a sweep"),
        ("lora", "r", "choice(8", "is not in the sweep grammar"),
        ("lora", "rank", "choice(8, 16)", "cannot be searched|is not a setting that can be searched"),
        ("lora", "dropout", "interval(0, 1.5)", r"must lie in \[0, 1\)"),
        ("optim", "lr", "tag(log, interval(0, 1e-3))", "a log range must start above 0"),
        ("train", "evals_per_epoch", "choice(1, 2)", "cannot be searched.*same rungs"),
        ("engine", "slots", "choice(1, 2)", "is not a setting that can be searched"),
    ],
)
def test_a_wrong_space_is_one_clear_message(section: str, name: str, expression: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_space(config_with(section, **{name: expression}))
