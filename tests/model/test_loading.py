"""The base as it is loaded: what is taken, what is refused with which words, and what the hub has to do with
it."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_search.engine.effect_checks import note_row_by_row
from lora_search.errors import ConfigError, ModelError
from lora_search.model.loading import Base, load_base, load_tokenizer, max_positions, resolve_model
from lora_search.model.packing_check import check_packing, runs_row_by_row
from lora_search.model.targets import target_layers
from lora_search.model.tiny import make_tiny_model
from lora_search.ops.device import gpu_dtype, pick_dtype
from lora_search.service.plain_peft import load_plain
from lora_search.settings.schema import EngineConfig, ModelConfig, SweepConfig


def load(path: Path | str, dtype: str = "float32") -> Base:
    config = ModelConfig(path=str(path))
    return load_base(resolve_model(config), config, EngineConfig(device="cpu", dtype=dtype))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((ModelError, ConfigError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama to be damaged."""
    return make_tiny_model(tmp_path / "model")


# Packed passes against the model's own attention.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "architecture",
    ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt_neox", "opt", "olmo2",
     "gpt_oss", "stablelm"],
)  # fmt: skip
def test_bases_that_packed_passes_compute_rightly_are_taken(
    tmp_path: Path, architecture: str, dtype: str
) -> None:
    base = load(make_tiny_model(tmp_path, architecture), dtype)

    assert base.model.config._attn_implementation == "lora_search_rows"
    assert len(target_layers(base.model, ("all-linear",))) >= 8


def make_as_if_trained(folder: Path, architecture: str) -> Path:
    make_tiny_model(folder, architecture)
    edit_weights(folder, lambda state: {k: 8 * v if v.dim() > 1 else v for k, v in state.items()})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["bloom", "mpt", "xglm"])
def test_bases_that_packed_passes_compute_wrongly_run_row_by_row(
    tmp_path: Path, architecture: str, dtype: str
) -> None:
    base = load(make_as_if_trained(tmp_path, architecture), dtype)

    assert runs_row_by_row(base.model)
    assert base.model.config._attn_implementation in ("sdpa", "eager")
    (line,) = note_row_by_row(base.model)
    assert line.startswith(f"a {architecture} model: each row of a pass runs alone, which is slower")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_looks_ahead_is_refused(tmp_path: Path, dtype: str) -> None:
    folder = make_as_if_trained(tmp_path, "bert")

    message = refusal(lambda: load(folder, dtype))

    assert message.startswith(f"model.path: {folder}")
    assert "row by row cannot run: a token's logits depend on later tokens. Choose" in message


class LeaksIntoTheNextRow(torch.nn.Module):
    """A convolution over two tokens, as hybrid models have: in a pass it reads across the end of a row."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        y: torch.Tensor = self.mlp(x) + before
        return y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_leak_into_the_first_token_of_a_row_alone_is_noticed(tmp_path: Path, dtype: str) -> None:
    model = load(make_tiny_model(tmp_path), dtype).model
    model.model.layers[-1].mlp = LeaksIntoTheNextRow(model.model.layers[-1].mlp)

    check_packing(model, "x")

    assert runs_row_by_row(model)


@pytest.mark.parametrize("key", ["logits_scaling", "logit_scale"])
def test_the_known_scales_of_logits_are_computed_and_others_are_refused(tmp_path: Path, key: str) -> None:
    folder = make_tiny_model(tmp_path, "granite" if key == "logits_scaling" else "cohere")
    edit_config(folder, **{key: 3.0})
    model = load(folder).model
    model.config.final_logit_softcapping = 1.0  # which the model's own forward pass does not apply

    assert "packed passes compute incorrectly: logits are off by" in refusal(
        lambda: check_packing(model, "x")
    )


def test_a_window_that_the_attention_never_hears_of_is_noticed(tmp_path: Path) -> None:
    model = load(make_tiny_model(tmp_path, "gemma2")).model
    model.model.layers[0].self_attn.sliding_window = None  # its configuration still says 4096

    check_packing(model, "gemma2")

    assert runs_row_by_row(model)  # where the mask has the window


class HalfOfTheTokens(torch.nn.Module):
    """A feed-forward layer that is given every second token, as an expert would be."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y[:, ::2] = self.expert(x[:, ::2])
        return y


def test_linear_layers_that_see_some_of_the_tokens_are_refused(tmp_path: Path) -> None:
    model = load(make_tiny_model(tmp_path)).model
    model.model.layers[1].mlp = HalfOfTheTokens()

    message = refusal(lambda: check_packing(model, "llama"))

    assert "its layer model.layers.1.mlp.expert does not get every token of a pass" in message


def test_the_check_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = load(make_tiny_model(tmp_path, "gemma2")).model

    assert model.config.sliding_window == 4096
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [4096, None]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


# What a checkpoint may lack.


def test_missing_weights_are_refused_by_name(folder: Path) -> None:
    edit_weights(folder, lambda state: {k: v for k, v in state.items() if "layers.1.mlp" not in k})

    message = refusal(lambda: load(folder))

    assert "lacks 3 of its weights: model.layers.1.mlp.down_proj.weight," in message
    assert message.endswith("Give the whole model, saved for causal language modelling.")


def test_a_tied_head_is_not_missing(folder: Path) -> None:
    edit_weights(folder, lambda state: {k: v for k, v in state.items() if k != "lm_head.weight"})
    assert "lacks 1 of its weights: lm_head.weight" in refusal(lambda: load(folder))
    edit_config(folder, tie_word_embeddings=True)

    model = load(folder).model

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [name for name in target_layers(model, ("all-linear",)) if "head" in name]


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda state: {**state, "model.norm.weight": torch.ones(32)})

    message = refusal(lambda: load(folder))

    assert "model.norm.weight is [32] in the file, [64] in the configuration" in message


@pytest.mark.wrong_input
@pytest.mark.parametrize("content", [b"", b"\0" * 100, None])
def test_damaged_weights_are_refused(folder: Path, content: bytes | None) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000] if content is None else content)

    assert "damaged or truncated: download it again" in refusal(lambda: load(folder))


@pytest.mark.wrong_input
@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"GGUF\x03\0\0\0" + b"\1" * 40])
def test_a_damaged_gguf_is_refused(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "base.gguf").write_bytes(content)

    message = refusal(lambda: load(tmp_path / "base.gguf"))

    assert message.startswith(f"model.path: {tmp_path}/base.gguf ")
    assert message.endswith("The file is damaged or truncated: download it again.")
    assert not (tmp_path / "cache").exists()


def test_a_folder_without_weights_or_configuration_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "Error no file named model.safetensors" in refusal(lambda: load(folder))

    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(lambda: load(folder))


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    config = ModelConfig(path=str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()

    message = refusal(lambda: load_tokenizer(resolve_model(config), config))

    assert "It has no tokenizer.json: save the tokenizer with the model." in message


@pytest.mark.wrong_input
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_that_cannot_be_read_is_refused(folder: Path, name: str) -> None:
    config = ModelConfig(path=str(folder))
    (folder / name).write_text('{"cut": ')

    message = refusal(lambda: load_tokenizer(resolve_model(config), config))

    assert message.endswith("The file is damaged or truncated: download it again.")


def test_an_adapter_is_no_base(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')

    assert "is an adapter (adapter_config.json), not a base" in refusal(lambda: load(folder))
    assert "Give the model it was trained on (org/base)" in refusal(lambda: load(folder))


def test_a_model_that_generates_no_text_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="t5")

    assert "It is not a causal language model" in refusal(lambda: load(folder))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_quantized_base_without_its_package_says_which(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 128})

    message = refusal(lambda: load(folder))

    assert "pip install" in message
    assert message.endswith("Install what it names, or choose another base.")


# Layers, dtype, length.


def test_gpt2s_layers_are_linear_once_loaded_and_others_carry_no_adapters(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder)

    assert {name.rpartition(".")[2] for name in target_layers(load(folder).model, ("all-linear",))} == {
        "c_attn", "c_proj", "c_fc"
    }  # fmt: skip
    for targets in (("all-linear",), ("c_attn",)):
        message = refusal(lambda t=targets: target_layers(model, t))
        assert "this gpt2 model has none: its layers are Conv1D. Choose another base." in message


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_spares_the_head_by_what_it_is(folder: Path, tied: bool) -> None:
    edit_config(folder, tie_word_embeddings=tied)
    model = load(folder).model
    model.model.layers[0].lm_head = torch.nn.Linear(64, 64)  # the name says nothing

    layers = target_layers(model, ("all-linear",))

    assert len(layers) == 2 * 7 + 1
    assert model.get_output_embeddings() not in layers.values()
    assert "lm_head is a Linear" in refusal(lambda: target_layers(model, ("lm_head",)))


def test_dtype_auto_goes_by_the_hardware() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    multiplies = "amx_bf16" in flags or "avx512_bf16" in flags

    assert pick_dtype("auto", torch.device("cpu")) is (torch.bfloat16 if multiplies else torch.float32)
    assert pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert pick_dtype("float32", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("auto", (9, 0), torch.bfloat16),
        ("auto", (8, 0), torch.bfloat16),
        ("auto", (7, 5), torch.float32),  # T4
        ("auto", (7, 0), torch.float32),  # V100
        ("auto", None, torch.bfloat16),  # ROCm
        ("float32", (9, 0), torch.float32),
        ("bfloat16", (9, 0), torch.bfloat16),
    ],
)
def test_the_dtype_on_a_gpu_goes_by_its_compute_capability(
    name: str, capability: tuple[int, int] | None, expected: torch.dtype
) -> None:
    assert gpu_dtype(name, capability) is expected


def test_bfloat16_on_a_gpu_without_it_is_refused_by_the_right_key() -> None:
    with pytest.raises(ConfigError, match=r"engine.dtype: needs compute capability 8.0.* has 7.5"):
        gpu_dtype("bfloat16", (7, 5))


def test_the_tokenizer_knows_how_much_the_model_can_read(folder: Path) -> None:
    config = ModelConfig(path=str(folder))
    edit_config(folder, max_position_embeddings=300)
    assert load_tokenizer(resolve_model(config), config).model_max_length == 300
    edit_config(folder, max_position_embeddings=3000)
    assert load_tokenizer(resolve_model(config), config).model_max_length == 512  # its own


def test_rotary_frequencies_that_depend_on_the_longest_row_bound_it() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}

    config = AutoConfig.for_model("llama", max_position_embeddings=512, rope_parameters=rope)

    assert max_positions(config) == 128


# The hub.


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub that refuses every connection."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(hub, "ENDPOINT", endpoint)
    return endpoint


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that answers, and knows no model."""

    class Nothing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Nothing)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        hub, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield endpoint
    server.shutdown()
    server.server_close()


@pytest.fixture
def cached_hub_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny Llama as the hub's cache holds a model that was fetched once."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))
    return "org/tiny"


def test_an_unreachable_hub_is_said_at_once(unreachable: str) -> None:
    start = time.perf_counter()

    message = refusal(lambda: load("org/nothing-of-that-name"))

    assert time.perf_counter() - start < 5
    assert f"nor in the hub's cache, and {unreachable} cannot be reached" in message
    assert message.endswith("Check the name and the network, or give a model folder.")


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)

    assert "and HF_HUB_OFFLINE is set" in refusal(lambda: load("org/nothing-of-that-name"))


@pytest.mark.usefixtures("unreachable")
def test_a_cached_hub_model_needs_no_hub(cached_hub_model: str) -> None:
    config, start = ModelConfig(path=cached_hub_model), time.perf_counter()

    tokenizer = load_tokenizer(resolve_model(config), config)
    base = load(cached_hub_model)

    assert time.perf_counter() - start < 5
    assert tokenizer.model_max_length == 512
    assert base.source == cached_hub_model


def test_a_cached_hub_model_loads_in_offline_mode(
    cached_hub_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)

    assert load(cached_hub_model).source == cached_hub_model


@pytest.mark.usefixtures("empty_hub")
def test_a_model_that_the_hub_does_not_know_keeps_the_hubs_own_message() -> None:
    message = refusal(lambda: load("org/nothing-of-that-name"))

    assert "org/nothing-of-that-name is not a local folder and is not a valid model identifier" in message
    assert "log in with `hf auth login` for gated models" in message


def test_what_is_no_hub_id_is_refused(unreachable: str) -> None:
    assert "nor a hub id" in refusal(lambda: load("no such: model"))
    assert unreachable


def test_plain_peft_keeps_to_the_cores_of_the_process(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        load_plain(
            SweepConfig(model=ModelConfig(path=str(tiny_llama)), engine=EngineConfig(device="cpu")), None
        )
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
