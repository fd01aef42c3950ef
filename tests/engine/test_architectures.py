"""docs/architectures.md is kept: what it lists trains to the number that plain PEFT gives, or is refused.
Mixtures of experts leave out just the layers that PEFT could not load."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.models.gemma3n import modeling_gemma3n

from lora_search.engine.effect_checks import check_outline, note_left_out
from lora_search.errors import ModelError
from lora_search.files.peft import fault_in_peft
from lora_search.model.targets import in_words, target_layers
from lora_search.model.tiny import ARCHITECTURES, make_tiny_tokenizer
from lora_search.settings.schema import ModelConfig
from tests.conftest import make_run
from tests.engine.test_engine import plain_perplexity
from tests.harness import build_engine, random_splits, train_all

SPLITS = random_splits(num_train=6, num_validation=3)
TABLE = (Path(__file__).parents[2] / "docs/architectures.md").read_text()
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
           "first_k_dense_replace": 1, "moe_num_experts": 4, "moe_k": 2}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
          "v_head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
HUNYUAN = {"moe_topk": [2, 2], "moe_intermediate_size": [32, 32], "num_shared_expert": [1, 1]}
GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
           "attention_multiplier": 0.125}  # fmt: skip
GEMMA_3N = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 313, "num_kv_shared_layers": 0,
            "laurel_rank": 8, "layer_types": ["full_attention"] * 2, "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0]}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
MAMBA_2 = {"num_heads": 8, "head_dim": 16, "state_size": 16, "chunk_size": 16, "n_groups": 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
          "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
          "shared_expert_intermediate_size": 32}  # fmt: skip
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
NEMOTRON_H = {"layer_types": ["mamba", "full_attention", "moe", "mlp"], "mamba_num_heads": 8,
              "mamba_head_dim": 16, "ssm_state_size": 16, "chunk_size": 16, "n_groups": 2}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
SEES = {"vision_config": VISION}
GEMMA_4 = {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8,
           "global_head_dim": 16, "num_global_key_value_heads": 2, "vocab_size_per_layer_input": 313,
           "num_kv_shared_layers": 0}  # fmt: skip
OWN_SIZES: dict[str, dict[str, object]] = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "youtu", "minicpm3"),
        EXPERTS | LATENT,
    ),
    **dict.fromkeys(("glm4_moe", "phimoe", "dots1", "exaone_moe", "mixtral", "olmoe", "qwen3_moe"), EXPERTS),
    **dict.fromkeys(("solar_open", "minimax_m2", "flex_olmo", "minimax", "gpt_oss", "hy_v3"), EXPERTS),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), EXPERTS | LINEAR),
    **dict.fromkeys(("qwen3_5_text", "olmo_hybrid"), LINEAR),
    **dict.fromkeys(("lfm2", "lfm2_moe"), EXPERTS | CONVOLUTION),
    "granitemoehybrid": EXPERTS
    | MAMBA
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "jamba": EXPERTS
    | {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "nemotron_h": EXPERTS | NEMOTRON_H,
    "mamba2": MAMBA_2,
    **dict.fromkeys(("gemma3", "llama4", "mllama", "gemma4_unified"), SEES),
    "qwen3_5": SEES | LINEAR,
    "qwen3_5_moe": SEES | LINEAR | EXPERTS,
    "gemma4": SEES | GEMMA_4,
    "gemma3n": {"vision_config": {}} | GEMMA_3N,
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "falcon": {"alibi": True, "head_dim": None},
    "ernie4_5_moe": EXPERTS | {"moe_layer_start_index": 1},
    "hunyuan_v1_moe": EXPERTS | HUNYUAN,
    "qwen2_moe": EXPERTS | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 32},
    "granite": GRANITE,
    "granitemoe": EXPERTS | GRANITE,
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "gemma3n_text": GEMMA_3N,
}
MLP = {"down_proj", "gate_proj", "up_proj"}
LEFT_OUT = {  # of all-linear
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe"), MLP),
    "phimoe": {"router"},
    "qwen2_moe": set(),
    "cohere": set(),
    "granite": set(),
    "mamba2": {"out_proj"},
    "bloom": set(),
    "gemma3": {"fc1", "fc2", "out_proj"},
}


@pytest.fixture(autouse=True)
def _no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave Gemma 3n's tower empty: it is one of timm's, a library of its own."""
    make = AutoModel.from_config

    def from_config(config: PretrainedConfig, **options: object) -> torch.nn.Module:
        return torch.nn.Module() if config.model_type == "gemma3n_vision" else make(config, **options)

    monkeypatch.setattr(modeling_gemma3n.AutoModel, "from_config", from_config)


def listed(heading: str) -> list[str]:
    """Return the architectures under a heading of the table."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", TABLE, re.MULTILINE | re.DOTALL)
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


HEADINGS = ("Packed", "Row by row", "Refused")
LISTED = {*listed("Packed"), *listed("Row by row")}


def sizes_of(architecture: str) -> dict[str, object]:
    """Return what makes a tiny configuration: of a model that sees, sizes of the text part and the other."""
    sizes = {**SIZES, **OWN_SIZES.get(architecture, {}), "vocab_size": len(make_tiny_tokenizer())}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if "vision_config" not in sizes:
        return sizes
    return {"vision_config": sizes.pop("vision_config"), "text_config": sizes}


def make_model(folder: Path, architecture: str, **changes: object) -> ModelConfig:
    tokenizer = make_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {**sizes_of(architecture), **changes}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(path=str(folder))


def check_exact(architecture: str, folder: Path, **changes: object) -> torch.nn.Module:
    """Train all-linear, load the adapter in plain PEFT and compare perplexities; return the plain base."""
    config = make_model(folder / "model", architecture)
    check_outline(config.path, config, [("all-linear",)])
    run = make_run(folder, 0, target_modules=("all-linear",), alpha=6.0, lr=2e-2, **changes)
    engine = build_engine(folder / "model", SPLITS)
    assert engine.model.is_row_by_row == (architecture in listed("Row by row"))
    curve = train_all(engine, [run])[0]

    attention = "eager" if architecture in listed("Packed") else None  # Falcon's eager one adds ALiBi twice
    base = AutoModelForCausalLM.from_pretrained(
        config.path, dtype=torch.float32, attn_implementation=attention
    )
    plain = PeftModel.from_pretrained(base, str(folder / "0" / "adapter"))
    assert plain_perplexity(plain, SPLITS.validation) == pytest.approx(curve[-1].best_perplexity, rel=1e-5)
    return plain.unload()


@pytest.mark.parametrize("architecture", LEFT_OUT)
def test_all_linear_leaves_out_what_peft_could_not_load_and_says_so(
    architecture: str, tmp_path: Path
) -> None:
    base = check_exact(architecture, tmp_path)

    note = " ".join(note_left_out(base, [("all-linear",)]))
    named = re.search("leaves out (.*?): ", note)
    assert set(named[1].split(", ") if named else ()) == LEFT_OUT[architecture]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT says so of GPT-2, and sets it
@pytest.mark.parametrize("architecture", sorted(LISTED - {*LEFT_OUT} - {*ARCHITECTURES}))
def test_a_listed_architecture_is_exact(architecture: str, tmp_path: Path) -> None:
    check_exact(architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT unties
@pytest.mark.parametrize(
    "changes",
    [
        {"neftune_alpha": 5.0},
        {"use_dora": True, "dropout": 0.1},
        {"modules_to_save": ("embed_tokens", "lm_head")},
    ],
)
@pytest.mark.parametrize("architecture", ["gemma3n_text", "gpt_neox", "qwen2"])
def test_options_are_exact_where_embeddings_and_biases_are_of_another_kind(
    architecture: str, changes: dict[str, object], tmp_path: Path
) -> None:
    check_exact(architecture, tmp_path, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", listed("Refused"))
def test_an_architecture_listed_as_refused_is_one_message(architecture: str, tmp_path: Path) -> None:
    config = make_model(tmp_path / "model", architecture)

    def load() -> None:
        check_outline(config.path, config, [("all-linear",)])
        build_engine(tmp_path / "model", SPLITS)

    with pytest.raises(ModelError) as refused:
        load()
    assert "\n" not in str(refused.value)


def test_the_table_lists_every_architecture_that_the_fast_tests_train() -> None:
    assert {*LEFT_OUT, *ARCHITECTURES} <= LISTED
    names = [name for heading in HEADINGS for name in listed(heading)]
    assert len(names) == len(set(names)) >= 85


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("architecture", "target", "message"),
    [
        (
            "glm4_moe",
            "gate_proj",
            "'gate_proj' of a glm4_moe model means its experts, .* Choose among",
        ),
        (
            "glm4_moe",
            "re:.*gate_proj",
            "the regular expression '.*gate_proj' of a glm4_moe model",
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


def test_targets_are_named_in_messages_as_the_user_wrote_them() -> None:
    assert in_words(("q_proj", "v_proj")) == "'q_proj', 'v_proj'"
    assert in_words((r"re:.*\.q_proj", "layers:0,3")) == r"the regular expression '.*\\.q_proj' in layers 0,3"


def test_an_adapter_that_peft_puts_elsewhere_is_refused(tiny_llama: Path) -> None:
    """As PEFT would: a name that means one layer here and two there."""
    outline = AutoModelForCausalLM.from_pretrained(tiny_llama, device_map="meta")
    layers = target_layers(outline, ("layers.1.self_attn.q_proj",))

    assert fault_in_peft(outline, layers, ["q_proj"]).endswith("has an adapter in one of the two only")
    assert fault_in_peft(outline, layers, ["model.layers.1.self_attn.q_proj"]) == ""
    assert "not found in the base model" in fault_in_peft(outline, layers, ["nowhere"])
