"""Mixtures of experts, latent attention, routers that return more than a product: trained where it is exact in
plain PEFT, refused by name where it is not."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lora_search.engine.effects import check_outline, note_left_out
from lora_search.errors import ModelError
from lora_search.files.peft import fault_in_peft
from lora_search.model.targets import target_layers
from lora_search.model.tiny import make_tiny_tokenizer
from lora_search.settings.schema import ModelConfig
from tests.conftest import make_run
from tests.engine.test_engine import plain_perplexity
from tests.harness import build_engine, random_splits, train_all

SPLITS = random_splits(num_train=6, num_validation=3)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
           "first_k_dense_replace": 1, "moe_num_experts": 4, "moe_k": 2}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
          "v_head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
HUNYUAN = {"moe_topk": [2, 2], "moe_intermediate_size": [32, 32], "num_shared_expert": [1, 1]}
MLP = {"down_proj", "gate_proj", "up_proj"}
MIXTURES = {  # architecture -> its sizes, and what all-linear leaves out
    "deepseek_v2": (EXPERTS | LATENT, MLP),
    "deepseek_v3": (EXPERTS | LATENT, MLP),
    "ernie4_5_moe": (EXPERTS | {"moe_layer_start_index": 1}, MLP),
    "glm4_moe": (EXPERTS, MLP),
    "hunyuan_v1_moe": (EXPERTS | HUNYUAN, MLP),
    "phimoe": (EXPERTS, {"router"}),
    "qwen2_moe": (EXPERTS | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 32}, set()),
}


def make_model(folder: Path, architecture: str) -> ModelConfig:
    tokenizer = make_tiny_tokenizer()
    sizes = {**SIZES, **MIXTURES[architecture][0], "vocab_size": len(tokenizer)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_what_all_linear_trains_gives_the_same_perplexity_in_plain_peft(
    architecture: str, tmp_path: Path
) -> None:
    config = make_model(tmp_path / "model", architecture)
    check_outline(config.path, config, [("all-linear",)])
    run = make_run(tmp_path, 0, target_modules=("all-linear",), alpha=6.0, lr=2e-2)

    engine = build_engine(tmp_path / "model", SPLITS)
    curve = train_all(engine, [run])[0]

    base = AutoModelForCausalLM.from_pretrained(config.path, dtype=torch.float32, attn_implementation="eager")
    (note, *_) = [*note_left_out(base, [("all-linear",)]), "all-linear leaves out : nothing"]
    named = re.search("leaves out (.*?): ", note)
    assert named is not None
    assert set(filter(None, named[1].split(", "))) == MIXTURES[architecture][1]
    plain = PeftModel.from_pretrained(base, str(tmp_path / "0" / "adapter"))
    assert plain_perplexity(plain, SPLITS.validation) == pytest.approx(curve[-1].best_perplexity, rel=1e-5)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("architecture", "target", "message"),
    [
        (
            "glm4_moe",
            "gate_proj",
            "'gate_proj' of a glm4_moe model means its experts, .* Choose among: k_proj",
        ),
        ("phimoe", "router", "router is a PhimoeTopKRouter; adapters go on linear layers"),
    ],
)
def test_a_target_that_peft_could_not_load_is_refused_before_weights_are_read(
    architecture: str, target: str, message: str, tmp_path: Path
) -> None:
    config = make_model(tmp_path / "model", architecture)

    with pytest.raises(ModelError, match=f"lora.target_modules: .*{message}"):
        check_outline(config.path, config, [(target,)])


def test_an_adapter_that_peft_puts_elsewhere_is_refused(tiny_llama: Path) -> None:
    """As PEFT would: a name that means one layer here and two there."""
    outline = AutoModelForCausalLM.from_pretrained(tiny_llama, device_map="meta")
    layers = target_layers(outline, ("layers.1.self_attn.q_proj",))

    assert fault_in_peft(outline, layers, ["q_proj"]).endswith("has an adapter in one of the two only")
    assert fault_in_peft(outline, layers, ["model.layers.1.self_attn.q_proj"]) == ""
    assert "not found in the base model" in fault_in_peft(outline, layers, ["nowhere"])
