"""Which part of a base goes to which device, and a base that is really loaded over two."""

from pathlib import Path

import pytest
import torch
from accelerate.utils import check_device_map
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from lora_search.errors import ConfigError
from lora_search.model.placement import describe_split, device_map, split_evenly
from lora_search.ops.device import pick_devices
from lora_search.ops.recompute import _again, recompute_layers
from tests.conftest import make_run
from tests.devices import DEVICES
from tests.engine.test_architectures import SIZES
from tests.engine.test_engine import losses
from tests.harness import build_engine, engine_over, load, random_splits, train_all

SPLITS = random_splits(num_train=6, num_validation=3)


def outline(architecture: str, **changes: object) -> torch.nn.Module:
    config = AutoConfig.for_model(architecture, **{**SIZES, "vocab_size": 320, **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@given(
    count=st.integers(1, 8),
    sizes=st.lists(st.floats(1.0, 1.5), min_size=16, max_size=100),
    rest=st.floats(0, 30),
)
def test_devices_get_layers_in_order_and_about_the_same_size(
    count: int, sizes: list[float], rest: float
) -> None:
    places = split_evenly(sizes, rest, count)

    assert places == sorted(places)
    assert set(places) == set(range(count))
    held = [sum(size for size, place in zip(sizes, places, strict=True) if place == i) for i in range(count)]
    share = (sum(sizes) + rest) / count
    limit = max(share, 1.5) + 1.5  # a layer more
    assert all(size <= limit for size in held[:-1])
    assert held[-1] + rest <= limit or held[-1] <= 1.5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "gemma3_text", "gpt_oss"])
def test_every_weight_has_a_device_and_the_head_is_on_the_last(architecture: str) -> None:
    model = outline(architecture, num_hidden_layers=7)

    places = device_map(model, DEVICES)

    check_device_map(model, places)  # raises for a weight without a device
    layers = [device for name, device in places.items() if name.rpartition(".")[2].isdigit()]
    assert layers == sorted(layers, key=DEVICES.index)
    assert len(layers) == 7
    (head,) = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    assert places[head] == DEVICES[1]


def test_a_layer_in_4_bits_counts_a_quarter() -> None:
    wide = outline("llama", num_hidden_layers=12, vocab_size=1000)

    plain, packed = (list(device_map(wide, DEVICES, is_packed).values()) for is_packed in (False, True))

    assert plain.count(DEVICES[0]) < packed.count(DEVICES[0])


def test_tied_weights_are_on_one_device() -> None:
    places = device_map(outline("llama", tie_word_embeddings=True), DEVICES)

    assert places["model.embed_tokens"] == places["lm_head"] == DEVICES[1]


def test_a_base_that_is_loaded_over_two_devices_trains_as_over_one(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers and accelerate load for real; cpu:0 and cpu:1 are one memory, which accelerate is told."""
    monkeypatch.setattr("accelerate.utils.modeling.check_device_same", lambda a, b: a.type == b.type)
    run = {"dropout": 0.1, "target_modules": ("all-linear",)}
    whole = train_all(build_engine(tiny_llama, SPLITS), [make_run(tmp_path / "one", **run)])
    model = load(tiny_llama, devices=2).model

    assert sorted(map(str, set(model.hf_device_map.values()))) == ["cpu:0", "cpu:1"]
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    recompute_layers(model)
    assert all(layer.forward.func is _again for layer in model.model.layers), "no hook is in the way"
    split = train_all(engine_over(model, tiny_llama, SPLITS), [make_run(tmp_path / "two", **run)])

    assert torch.equal(losses(split[0]), losses(whole[0]))


def test_a_base_on_one_device_has_no_split() -> None:
    assert describe_split(outline("llama")) == ""


@pytest.mark.wrong_input
def test_more_devices_than_layers_or_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    three = [torch.device("cpu", i) for i in range(3)]
    with pytest.raises(
        ConfigError, match="devices_per_worker: must be at most 2, the decoder layers .*, got 3"
    ):
        device_map(outline("llama"), three)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match="devices_per_worker: must be at most 1, the GPUs that .*, got 2. .*nf4"
    ):
        pick_devices("auto", 2)
