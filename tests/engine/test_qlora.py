"""Adapters over a base in 4 bits: the same promises as over a plain one. On the CPU, where bitsandbytes has
NormalFloat kernels as well."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_search.engine.bank import SlotBank
from lora_search.engine.engine import Engine
from lora_search.engine.packed_model import PackedModel
from lora_search.errors import ConfigError
from lora_search.files.peft import BaseRecord
from lora_search.model import loading as model_module
from lora_search.model.loading import Base, load_base, resolve_model
from lora_search.model.targets import matches, target_layers
from lora_search.ops.recompute import recompute_layers
from lora_search.settings.schema import EngineConfig, ModelConfig
from tests.conftest import make_run
from tests.engine.test_engine import losses, mixed_runs, perplexities, plain_perplexity
from tests.harness import random_splits, train_all

SPLITS = random_splits()
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, the extra qlora, is not installed"
)


def quantized_base(folder: Path) -> Base:
    config = ModelConfig(path=str(folder), quantization="nf4")
    return load_base(resolve_model(config), config, EngineConfig(device="cpu", dtype="float32"))


def quantized_engine(folder: Path, *, slots: int = 1, tokens_per_pass: int = 64) -> Engine:
    base = quantized_base(folder)
    layers = target_layers(base.model, ("all-linear",))
    bank = SlotBank(base.model, layers, slots, 8)
    return Engine(
        PackedModel(base.model, bank),
        bank,
        SPLITS,
        data_seed=0,
        tokens_per_pass=tokens_per_pass,
        base=BaseRecord(path=str(folder)),
        resolve_targets=lambda targets: tuple(name for name in layers if matches(name, targets)),
    )


@needs_bitsandbytes
def test_the_base_is_in_four_bits_and_the_head_is_not(tiny_llama: Path) -> None:
    model = quantized_base(tiny_llama).model

    layers = target_layers(model, ("all-linear",))

    assert {type(layer).__name__ for layer in layers.values()} == {"Linear4bit"}
    assert {layer.weight.quant_state.quant_type for layer in layers.values()} == {"nf4"}
    assert {
        layer.weight.numel() * 2 / layer.in_features / layer.out_features for layer in layers.values()
    } == {1.0}
    assert model.lm_head.weight.dtype is torch.float32
    assert not any(p.requires_grad for p in model.parameters())


@needs_bitsandbytes
def test_packed_equals_solo_over_a_quantized_base(tiny_llama: Path, tmp_path: Path) -> None:
    solo = train_all(quantized_engine(tiny_llama), mixed_runs(tmp_path / "solo"))

    packed = train_all(quantized_engine(tiny_llama, slots=5, tokens_per_pass=300), mixed_runs(tmp_path))

    for number, curve in solo.items():
        torch.testing.assert_close(losses(packed[number]), losses(curve), rtol=1e-5, atol=0)
        torch.testing.assert_close(perplexities(packed[number]), perplexities(curve), rtol=1e-5, atol=0)


@needs_bitsandbytes
def test_layers_in_four_bits_that_are_computed_again_give_the_same_losses(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """As a 70B model trains on one card."""
    chosen = {"target_modules": ("all-linear",), "dropout": 0.1}
    kept = train_all(quantized_engine(tiny_llama), [make_run(tmp_path / "kept", **chosen)])[0]
    engine = quantized_engine(tiny_llama)
    recompute_layers(engine.model.decoder)

    again = train_all(engine, [make_run(tmp_path / "again", **chosen)])[0]

    torch.testing.assert_close(losses(again), losses(kept), rtol=1e-6, atol=0)


@needs_bitsandbytes
def test_exported_adapter_gives_the_same_perplexity_in_plain_peft(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, 0, target_modules=("all-linear",), alpha=6.0)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )

    curve = train_all(quantized_engine(tiny_llama), [run])[0]

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=nf4, dtype=torch.float32)
    layers = target_layers(base, ("all-linear",)).values()
    for layer in layers:
        layer.train()  # or bitsandbytes rounds activations to bfloat16 on some CPUs
    plain = plain_perplexity(base, SPLITS.validation)
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "0" / "adapter"))
    for layer in layers:
        layer.train()  # PEFT has put it into evaluation mode
    assert plain_perplexity(tuned, SPLITS.validation) == pytest.approx(curve[-1].best_perplexity, rel=1e-5)
    assert curve[-1].best_perplexity < 0.995 * plain


def test_without_bitsandbytes_the_message_says_what_to_install(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module.importlib.util, "find_spec", lambda _: None)

    with pytest.raises(ConfigError, match=r"model.quantization: needs the bitsandbytes package, got 'nf4'"):
        quantized_base(tiny_llama)


def test_another_quantization_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.quantization: must be null or nf4, got 'int8'"):
        ModelConfig(quantization="int8")
