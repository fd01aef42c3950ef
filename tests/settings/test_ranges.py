"""Impossible sizes: each number has an upper end, and the message says what to give instead."""
# ruff: noqa: E501 (a table has long rows)

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from lora_search.errors import ConfigError
from lora_search.settings.data_schema import DataConfig
from lora_search.settings.schema import SweepConfig

COUNTS = [
    "seed", "data.max_train_examples", "data.max_validation_examples", "data.demo_train_examples",
    "data.demo_validation_examples", "data.max_length", "engine.slots", "engine.tokens_per_pass", "engine.devices_per_worker", "lora.r",
    "launcher.workers", "launcher.worker", "launcher.max_restarts", "launcher.cpus_per_worker", "launcher.minutes", "metric.max_new_tokens",
    "metric.max_rows", "pruner.first_rung", "pruner.n_startup_trials",
    "pruner.patience", "pruner.reduction_factor", "sampler.n_startup_trials", "study.heartbeat_seconds",
    "study.max_failures_in_a_row", "study.max_retries", "study.n_trials", "study.patience_seconds", "study.sample_answers",
    "train.batch_size", "train.early_stopping_patience", "train.epochs", "train.evals_per_epoch",
    "train.gradient_accumulation_steps", "train.seed", "study.max_tokens",
    "optim.warmup_steps",
]  # fmt: skip
FRACTIONS = [
    "data.max_length_percentile", "data.test_fraction", "data.validation_fraction", "lora.dropout", "optim.beta1",
    "optim.beta2", "optim.eps", "optim.lr", "optim.max_grad_norm", "lora.alpha", "optim.warmup_ratio", "optim.weight_decay", "pruner.percentile",
    "optim.min_lr_ratio", "optim.decay_ratio", "optim.lora_plus_ratio", "train.neftune_alpha",
    "train.label_smoothing", "launcher.gpus_per_worker", "study.keep_gib", "study.max_cost", "study.max_hours", "study.price_per_hour",
]  # fmt: skip
HUGE = [-1, -(10**18), 10**18, 2**63, 2**64 + 1, 10**40]
UNREAL = [-0.5, -1e18, 1e18, float("inf"), float("-inf"), float("nan")]


def make(key: str, value: object) -> object:
    """Build the settings' class that has the key, with the value."""
    section, _, name = key.rpartition(".")
    if not section:
        return SweepConfig(**{name: value})  # type: ignore[arg-type]
    if section == "data":
        return DataConfig(**{"path": "a.jsonl", name: value})  # type: ignore[arg-type]
    kind: Callable[..., object] = type(getattr(SweepConfig(data=DataConfig(path="x")), section))
    more = {"name": "slurm"} if section == "launcher" else {}
    more |= {"price_per_hour": 1.0} if key == "study.max_cost" else {}  # type: ignore[dict-item]
    return kind(**more, **{name: value})


def refuse(key: str, value: object) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        make(key, value)
    return refused.value


@pytest.mark.wrong_input
@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", HUGE, ids=str)
def test_an_impossible_count_is_refused_by_its_key_with_a_rule(key: str, value: int) -> None:
    error = refuse(key, value)

    assert error.exit_code == 2
    assert str(error).startswith(f"{key}: must ")
    assert str(value) in str(error)


@pytest.mark.wrong_input
@pytest.mark.parametrize("key", FRACTIONS)
@pytest.mark.parametrize("value", UNREAL, ids=str)
def test_an_impossible_number_is_refused_by_its_key_with_a_rule(key: str, value: float) -> None:
    error = refuse(key, value)

    assert error.exit_code == 2
    assert key in str(error)
    assert "must" in str(error)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 60_000, "gradient_accumulation_steps": 60_000}, "batch_size x train.gradient_accum"),
        (
            {"epochs": 10_000, "evals_per_epoch": 10_000},
            "train.epochs x train.evals_per_epoch: must be at most",
        ),
    ],
)
def test_a_product_that_no_data_fill_is_refused(changes: dict[str, int], message: str) -> None:
    kind: Callable[..., object] = type(SweepConfig(data=DataConfig(path="x")).train)

    with pytest.raises(ConfigError, match=message):
        kind(**changes)


def test_no_number_is_left_out_of_the_tables() -> None:
    """A new key without an upper end fails here."""
    assert set(numbers(SweepConfig(data=DataConfig(path="x")), "")) == {*COUNTS, *FRACTIONS}


def numbers(config: Any, prefix: str) -> list[str]:
    """Return the keys whose type says int or float."""
    found = []
    for item in fields(config):
        value, kind = getattr(config, item.name), str(item.type)
        if is_dataclass(value):
            found += numbers(value, f"{prefix}{item.name}.")
        elif "int" in kind + str(getattr(item.type, "__name__", "")) or "float" in kind:
            found += [] if "list" in kind else [f"{prefix}{item.name}"]
    return found
