"""The engine as a library: settings in, measurements out."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lora_search import training
from lora_search.errors import ConfigError
from lora_search.settings.schema import (
    ColumnsConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    SweepConfig,
    TrainConfig,
)
from lora_search.training import train


def tiny_config() -> SweepConfig:
    return SweepConfig(
        model=ModelConfig(path="tiny-llama"),
        data=DataConfig(
            path="construction-faq",
            columns=ColumnsConfig(response="output"),
            max_train_examples=12,
            max_validation_examples=4,
            max_length=128,
        ),
        train=TrainConfig(epochs=1, evals_per_epoch=3, batch_size=2),
        engine=EngineConfig(slots=2, device="cpu", dtype="float32"),
    )


def test_every_setting_is_measured_at_every_rung_and_leaves_its_adapter(tmp_path: Path) -> None:
    settings = [{"lora.r": 4}, {"lora.r": 8, "lora.target_modules": ["up_proj"]}, {"optim.lr": 1e-3}]

    measurements = list(train(tiny_config(), settings, tmp_path))

    assert sorted((m.trial_number, m.rung) for m in measurements) == [
        (i, k) for i in range(3) for k in (1, 2, 3)
    ]
    assert [m.ended for m in measurements if m.rung == 3] == ["finished"] * 3
    assert all((tmp_path / str(i) / "adapter" / "adapter_config.json").is_file() for i in range(3))


def test_equal_seeds_give_the_same_curve_bit_for_bit_where_trials_train_alone(tmp_path: Path) -> None:
    config = replace(tiny_config(), engine=EngineConfig(slots=1, device="cpu", dtype="float32"))
    settings = [{"optim.lr": 5e-3, "train.seed": seed} for seed in (5, 5, 6)]
    curves: dict[int, list[float]] = {0: [], 1: [], 2: []}

    for measurement in train(config, settings, tmp_path):
        curves[measurement.trial_number].append(measurement.perplexity)

    assert curves[0] == curves[1]
    assert curves[2] != pytest.approx(curves[0], rel=1e-5)


def test_a_trial_ends_where_stop_says_so(tmp_path: Path) -> None:
    settings = [{"lora.r": 4}, {"lora.r": 8}]

    measurements = list(train(tiny_config(), settings, tmp_path, stop=lambda m: m.trial_number == 1))

    assert [m.rung for m in measurements if m.trial_number == 0] == [1, 2, 3]
    assert [m.rung for m in measurements if m.trial_number == 1] == [1]


def test_an_unknown_setting_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.rank: is not a setting of a trial.*lora.r, lora.alpha"):
        next(train(tiny_config(), [{"lora.rank": 8}], tmp_path))


def test_the_example_runs_on_ones_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"What is {i} plus one?", "response": f"It is {i + 1}."} for i in range(60)]
    Path("faq.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    example = "\n".join(inspect.cleandoc(training.__doc__ or "").splitlines()[2:])
    names: dict[str, dict[int, float]] = {}

    exec(example.replace("smollm2-135m-instruct", "tiny-llama"), names)

    assert sorted(names["best"]) == [0, 1]
    assert (tmp_path / "runs/by_hand/1/adapter/adapter_config.json").is_file()
