"""Files of a base that are not what they should be are refused in no time, before weights are read."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_search.errors import ModelError
from lora_search.model.checks import check_folder, check_gguf
from lora_search.model.loading import load_outline, resolve_model
from lora_search.model.targets import target_layers
from lora_search.model.tiny import make_tiny_model
from lora_search.settings.schema import ModelConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.path: ")
    return str(caught.value)


def outline_of(path: Path) -> object:
    config = ModelConfig(path=str(path))
    return load_outline(resolve_model(config), config)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def shard(folder: Path) -> list[Path]:
    """Cut the weights of the folder into two files with an index."""
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    halves = {f"model-0000{i}-of-00002.safetensors": sorted(state)[i - 1 :: 2] for i in (1, 2)}
    for name, keys in halves.items():
        save_file({key: state[key] for key in keys}, folder / name, metadata={"format": "pt"})
    places = {key: name for name, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return [folder / name for name in halves]


def gguf(*tensors: tuple[str, int, int], kind: str = "model", parts: int = 1) -> bytes:
    """Return a GGUF file of tensors of one dimension: name, number of float32 values, offset."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [
        text("general.type") + struct.pack("<I", 8) + text(kind),
        text("split.count") + struct.pack("<IH", 2, parts),
        text("tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("bb") + text(""),
        text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 0.0, 1.0, 2.0),
    ]
    entries = [text(name) + struct.pack("<IQIQ", 1, length, 0, offset) for name, length, offset in tensors]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(keys)) + b"".join(keys + entries)
    return header + bytes(-len(header) % 32) + bytes(sum(4 * length for _, length, _ in tensors))


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3_moe", "gemma3_text", "opt", "gpt_neox"])
def test_the_outline_has_the_layers_of_the_model_and_no_weights(tmp_path: Path, architecture: str) -> None:
    outline = outline_of(make_tiny_model(tmp_path / "model", architecture))

    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    assert len(target_layers(outline, ("all-linear",))) > 4


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("target", "message"), [("w_proj", "no layer 'w_proj'. There are: "), ("embed_tokens", "is a Embedding")]
)
def test_a_wrong_target_is_refused_by_the_outline(folder: Path, target: str, message: str) -> None:
    outline = outline_of(folder)

    with pytest.raises(ModelError, match=f"lora.target_modules: .*{message}"):
        target_layers(outline, (target,))


def test_fewer_layers_than_there_are_weights_are_refused_with_names(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1, layer_types=None)

    message = refusal(lambda: outline_of(folder))

    assert "has 9 weights that its config.json does not: model.layers.1.input_layernorm.weight" in message


def test_more_layers_than_there_are_weights_are_refused_with_names(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3, layer_types=None)

    assert "lacks 9 of its weights: model.layers.2.input_layernorm.weight" in refusal(
        lambda: outline_of(folder)
    )


def test_weights_of_another_family_are_refused(folder: Path) -> None:
    bias = {f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(64) for i in (0, 1)}
    edit_weights(folder, lambda state: state | bias)

    assert "has 2 weights that its config.json does not" in refusal(lambda: outline_of(folder))


def test_another_width_is_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)

    assert "[128, 64] in the file, [96, 64] in the config" in refusal(lambda: outline_of(folder)) or (
        "[64, 128] in the file, [64, 96] in the config" in refusal(lambda: outline_of(folder))
    )


def test_a_sharded_model_is_whole(folder: Path) -> None:
    shard(folder)

    assert outline_of(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)[1].unlink()

    assert (
        "lacks 1 of the 2 files that model.safetensors.index.json names: model-00002-of-00002.safetensors"
        in refusal(lambda: outline_of(folder))
    )


def test_a_shard_that_is_cut_short_is_named_with_both_sizes(folder: Path) -> None:
    path = shard(folder)[1]
    size = path.stat().st_size
    os.truncate(path, size - 1)

    message = refusal(lambda: outline_of(folder))

    assert f"{path} has {size - 1:,} bytes, but its header says {size:,}" in message


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": 1}', "{", '{"weight_map": {"a": {}}}']
)
def test_an_index_that_cannot_be_read_is_refused(folder: Path, content: str) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)

    message = refusal(lambda: check_folder(folder))

    assert "model.safetensors.index.json names no files of weights" in message


KINDS = [
    (b"", "is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer"),
    (b"GGUF\x03\0\0\0" + bytes(64), "is a GGUF file"),
    (b"PK\x03\x04" + bytes(64), "is a zip archive"),
    (b"<!doctype html><html>", "is a web page"),
    (b"\0" * 100, "is no safetensors file"),
    (b"\xff" * 100, "is no safetensors file"),
    (struct.pack("<Q", 10) + b"{not json}" + bytes(9), "is no safetensors file"),
    (struct.pack("<Q", 2) + b"[]", "is no safetensors file"),
    (struct.pack("<Q", 7) + b'{"a":1}', "is no safetensors file"),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("content", "message"), KINDS)
def test_weights_of_another_kind_are_named_as_what_they_are(
    folder: Path, content: bytes, message: str
) -> None:
    (folder / "model.safetensors").write_bytes(content)

    assert f"model.safetensors {message}" in refusal(lambda: check_folder(folder))


@pytest.mark.wrong_input
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"no pickle"])
def test_a_pickle_of_another_kind_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)

    assert "pytorch_model.bin is " in refusal(lambda: check_folder(folder))


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "adapter_config.json"]
)
def test_a_pipe_in_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

    assert f"{name} is a pipe" in refusal(lambda: resolve_model(ModelConfig(path=str(folder))))


@pytest.mark.wrong_input
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_device_in_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")

    assert f"{name} is a device" in refusal(lambda: resolve_model(ModelConfig(path=str(folder))))


def test_a_configuration_of_gigabytes_is_refused_unread(folder: Path) -> None:
    os.truncate(folder / "config.json", 10 * 2**30)  # a hole: it takes no room

    assert "config.json has 10,737,418,240 bytes" in refusal(
        lambda: resolve_model(ModelConfig(path=str(folder)))
    )


@pytest.mark.wrong_input
@pytest.mark.parametrize("suffix", ["", ".gguf"])
@pytest.mark.parametrize(("kind", "message"), [("pipe", "is a pipe"), ("device", "is a device")])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, suffix: str, kind: str, message: str) -> None:
    path = tmp_path / f"base{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")

    assert message in refusal(lambda: resolve_model(ModelConfig(path=str(path))))


def test_a_folder_may_be_called_like_a_gguf_file(tmp_path: Path) -> None:
    assert outline_of(make_tiny_model(tmp_path / "model.gguf"))


GOOD = gguf(("a", 16, 0), ("b", 8, 64))


def test_a_whole_gguf_file_passes(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(GOOD)

    check_gguf(tmp_path / "base.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04", "is a zip archive"),
        (b"\0" * 100, "is no GGUF file"),
        (GOOD[:-1], f"has {len(GOOD) - 1} bytes, but its header says {len(GOOD)}"),
        (GOOD[:30], "has a header that cannot be read"),
        (GOOD[:150], "has a header that cannot be read"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 40, "has a header that cannot be read"),
        (gguf(kind="adapter"), "is not a model (adapter)"),
        (gguf(kind="mmproj"), "is not a model (mmproj)"),
        (gguf(parts=3), "is one of 3 parts of a model. Join them"),
    ],
)
def test_a_gguf_file_that_is_none_or_not_whole_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "base.gguf").write_bytes(content)

    assert message in refusal(lambda: check_gguf(tmp_path / "base.gguf"))


def test_gigabytes_of_nothing_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    path.touch()
    os.truncate(path, 50 * 2**30)

    assert "is no GGUF file" in refusal(lambda: resolve_model(ModelConfig(path=str(path))))


def test_a_revision_of_a_model_on_this_machine_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="model.revision: is for a model of the hub, .* Leave it out"):
        resolve_model(ModelConfig(path=str(folder), revision="main"))


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "two"}, "cannot be loaded: .*num_hidden_layers.* Check the files in it"),
        ({"num_hidden_layers": 10**6}, "asks for 1,000,000 layers, more than 1,000"),
        ({"num_attention_heads": 3}, "cannot be loaded: .*multiple of the number of attention heads"),
        ({"vocab_size": None}, "cannot be loaded: .*vocab_size"),
        ({"hidden_act": "nosuch"}, "cannot be loaded: 'nosuch'"),
        ({"rope_scaling": {"type": "nosuch"}}, "cannot be loaded: 'nosuch'"),
    ],
)
def test_a_configuration_that_no_model_has_is_one_message(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    edit_config(folder, **changes)

    assert re.search(message, refusal(lambda: outline_of(folder)))


@pytest.mark.wrong_input
@pytest.mark.parametrize("content", ["3", "[]", "null", '"llama"'])
def test_a_configuration_that_is_no_object_is_one_message(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)

    assert "config.json is no JSON object" in refusal(lambda: outline_of(folder))
