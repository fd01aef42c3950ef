"""Trained biases of adapted layers against plain PEFT's `bias="lora_only"`, alone and beside other trials."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from lora_search.engine.build import Room
from lora_search.engine.effect_checks import check_outline
from lora_search.errors import ModelError
from lora_search.files.peft import Tuned, merge_adapter
from lora_search.service.plain_peft import plain_perplexity
from tests.conftest import make_run
from tests.engine.test_architectures import make_model
from tests.engine.test_checkpoint import as_known, finish, train_until
from tests.engine.test_options import SPLITS, exported_perplexity, losses, plain_base, plain_losses
from tests.harness import build_engine, starting_adapter, train_all

OPTIONS: dict[str, dict[str, object]] = {
    "Qwen 2": {"bias": "lora_only", "weight_decay": 0.9},
    "Qwen 2 with DoRA and LoRA+": {
        "bias": "lora_only", "use_dora": True, "lora_plus_ratio": 4.0, "weight_decay": 0.9,
        "target_modules": ("all-linear",),
    },
    "Qwen 2 with trained tokens": {"bias": "lora_only", "trainable_token_indices": (7, 40), "r": 2},
    "GPT-2": {"bias": "lora_only", "weight_decay": 0.9, "target_modules": ("all-linear",)},
}  # fmt: skip


def biased(folder: Path, architecture: str) -> Path:
    """Make a tiny model whose biases are not zero."""
    make_model(folder, architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False:UserWarning"
)  # PEFT sets it itself (GPT-2)
@pytest.mark.parametrize("name", OPTIONS)
def test_biases_train_as_in_peft_without_weight_decay(name: str, tmp_path: Path) -> None:
    folder = biased(tmp_path / "model", "gpt2" if name == "GPT-2" else "qwen2")
    run = make_run(tmp_path, 0, alpha=6.0, **OPTIONS[name])
    start = starting_adapter(build_engine(folder, SPLITS), run, tmp_path / "start")
    model = PeftModel.from_pretrained(plain_base(folder), str(start), is_trainable=True)
    expected = plain_losses(model, run, SPLITS)

    curve = train_all(build_engine(folder, SPLITS), [run])[0]

    torch.testing.assert_close(losses(curve), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert exported_perplexity(folder, tmp_path) == pytest.approx(curve[-1].best_perplexity, rel=1e-5)
    other = replace(run, settings=replace(run.settings, bias="none"), folder=str(tmp_path / "1"))
    without = train_all(build_engine(folder, SPLITS), [other])[0]
    assert not torch.allclose(losses(without), losses(curve), rtol=1e-4)


def test_packed_trials_with_and_without_biases_train_as_alone(tmp_path: Path) -> None:
    folder = biased(tmp_path / "model", "qwen2")
    chosen = [{"bias": "lora_only"}, {}, {"bias": "lora_only", "lr": 0.02, "target_modules": ("k_proj",)}, {}]
    runs = [make_run(tmp_path, i, **changes) for i, changes in enumerate(chosen)]
    alone = {run.number: train_all(build_engine(folder, SPLITS), [run])[run.number] for run in runs}
    again = [make_run(tmp_path / "packed", i, **changes) for i, changes in enumerate(chosen)]

    packed = train_all(build_engine(folder, SPLITS, slots=3, tokens_per_pass=200), again)

    for number, solo in alone.items():
        torch.testing.assert_close(losses(packed[number]), losses(solo), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_with_biases_has_the_tensors_that_peft_writes(dtype: str, tmp_path: Path) -> None:
    folder = biased(tmp_path / "model", "qwen2")
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        PeftLoraConfig(r=4, target_modules=["q_proj", "o_proj"], bias="lora_only", task_type="CAUSAL_LM"),
    )
    expected = {name: (t.shape, t.dtype) for name, t in get_peft_model_state_dict(theirs).items()}
    run = make_run(tmp_path, 0, target_modules=("q_proj", "o_proj"), bias="lora_only")

    train_all(build_engine(folder, SPLITS, dtype=dtype), [run])

    written = load_file(tmp_path / "0/adapter/adapter_model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in written.items()} == expected
    assert len(expected) == 2 * 2 * 2 + 2  # A and B of two layers' two targets, and q_proj's biases


def test_transformers_decays_no_bias(tmp_path: Path) -> None:
    config = PeftLoraConfig(r=4, target_modules=["q_proj"], bias="lora_only", use_dora=True)
    model = get_peft_model(plain_base(biased(tmp_path, "qwen2")), config)

    decayed = Trainer.get_decay_parameter_names(None, model)

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = {name.rpartition("q_proj.")[2] for name in trained - set(decayed)}
    assert kinds == {"base_layer.bias"}


def test_several_adapters_with_biases_on_one_base_do_not_change_each_other(tmp_path: Path) -> None:
    folder = biased(tmp_path / "model", "qwen2")
    chosen = [{"bias": "lora_only"}, {"bias": "lora_only", "target_modules": ("k_proj",)}, {}]
    runs = [make_run(tmp_path, i, lr=0.05, **changes) for i, changes in enumerate(chosen)]
    train_all(build_engine(folder, SPLITS), runs)
    ids = torch.tensor([SPLITS.validation[0].input_ids])
    adapters = {str(i): tmp_path / str(i) / "adapter" for i in range(3)}
    with torch.no_grad():
        alone = [
            PeftModel.from_pretrained(plain_base(folder), str(path))(ids).logits for path in adapters.values()
        ]
        expected = [plain_base(folder)(ids).logits, *alone]

    tuned = Tuned(plain_base(folder), adapters)

    for name, logits in zip((None, *adapters), expected, strict=True):
        with tuned.using(name) as model, torch.no_grad():
            assert torch.equal(model(ids).logits, logits)


@pytest.mark.wrong_input
def test_biases_of_layers_that_have_none_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    config = make_model(tmp_path, "qwen2")
    trials = [make_run(tmp_path, 0, target_modules=("o_proj", "down_proj"), bias="lora_only").settings]
    room = Room.of(trials)

    with pytest.raises(
        ModelError, match="lora.bias: no layer of 'o_proj', 'down_proj' has a bias in this qwen2"
    ):
        check_outline(config.path, config, room.targets, biased=room.biased)
    check_outline(config.path, config, [("q_proj",)], biased=[*room.biased, ("q_proj",)])


@pytest.mark.wrong_input
@pytest.mark.parametrize("architecture", ["mamba", "jamba"])
def test_biases_that_a_model_reads_past_the_layer_are_refused(architecture: str, tmp_path: Path) -> None:
    config = make_model(tmp_path, architecture)

    with pytest.raises(ModelError, match=f"lora.bias: this {architecture} model takes the bias of dt_proj"):
        check_outline(config.path, config, [("all-linear",)], biased=[("all-linear",)])


def test_a_resumed_trial_with_biases_goes_on_bitwise(tmp_path: Path) -> None:
    folder = biased(tmp_path / "model", "qwen2")
    changes = {"bias": "lora_only", "dropout": 0.1, "use_dora": True}
    undisturbed = train_all(build_engine(folder, SPLITS), [make_run(tmp_path / "whole", **changes)])[0]
    run = make_run(tmp_path, **changes)
    before = train_until(build_engine(folder, SPLITS), run, 2)
    engine = build_engine(folder, SPLITS)
    engine.admit([as_known(run, before)])

    rest = finish(engine)

    assert [m.rung for m in rest] == [3, 4]
    assert losses(rest).tolist() == losses(undisturbed[2:]).tolist()
    assert [m.perplexity for m in rest] == [m.perplexity for m in undisturbed[2:]]


def test_merged_weights_have_the_biases(tmp_path: Path) -> None:
    folder = biased(tmp_path / "model", "qwen2")
    curve = train_all(build_engine(folder, SPLITS), [make_run(tmp_path, 0, bias="lora_only", lr=0.05)])[0]

    merge_adapter(plain_base(folder), tmp_path / "0" / "adapter", tmp_path / "merged")

    found = plain_perplexity(plain_base(tmp_path / "merged"), SPLITS.validation)
    assert found == pytest.approx(curve[-1].best_perplexity, rel=1e-5)
