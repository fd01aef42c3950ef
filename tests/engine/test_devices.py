"""A base over several devices: the same numbers as on one, and nothing is ever on the wrong device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_search.engine.bank import SlotBank
from lora_search.engine.engine import Engine
from lora_search.engine.generation import generate
from lora_search.engine.packed_model import PackedModel
from lora_search.files.peft import read_peft
from lora_search.model.adaptation import adapt
from lora_search.model.packing_check import check_packing
from lora_search.model.placement import bring_inputs, describe_split, device_map
from lora_search.model.targets import target_layers
from lora_search.ops import attention
from lora_search.ops.attention import NAME
from lora_search.ops.lora import PLAIN, Layer, Plan, Products
from lora_search.ops.recompute import recompute_layers
from lora_search.trial import Measurement, TrialRun
from tests.conftest import SETTINGS, make_run
from tests.devices import DEVICES, WITHOUT_VALUES, Placed, WrongDeviceError, spread
from tests.engine.test_architectures import OWN_SIZES, SIZES
from tests.engine.test_cuda_paths import TINY, OnMeta, packs
from tests.engine.test_engine import losses, perplexities
from tests.harness import build_engine, engine_over, load, random_splits, train_all

SPLITS = random_splits(num_train=8, num_validation=3)
UNCLIPPED = 1e6  # a gradient norm above all
SLOTS = {"slots": 4, "tokens_per_pass": 200}


@pytest.fixture(autouse=True)
def _row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend as on CUDA in float32: the way of CPUs makes its indices on the host."""
    monkeypatch.setattr(attention, "LONGEST_ROW", 0)


@contextmanager
def two_devices(folder: Path, recomputed: bool = False) -> Iterator[Engine]:
    """Give an engine whose base has its first layer on one device and all else on another."""
    model = load(folder).model
    with spread(model, device_map(model, DEVICES)):
        bring_inputs(model)
        if recomputed:
            recompute_layers(model)
        yield engine_over(model, folder, SPLITS, **SLOTS)


def runs(folder: Path) -> list[TrialRun]:
    """Return trials with all that a pass may hold: dropout, DoRA, noise, smoothing, layers of one device."""
    first, both = ("layers:0", "all-linear"), ("all-linear",)
    return [
        make_run(folder, 0, dropout=0.05, max_grad_norm=UNCLIPPED),
        make_run(folder, 1, r=8, use_dora=True, dropout=0.3, target_modules=both, max_grad_norm=UNCLIPPED,
                 lora_plus_ratio=4.0),
        make_run(folder, 2, target_modules=first, neftune_alpha=5.0, max_grad_norm=UNCLIPPED, epochs=3),
        make_run(folder, 3, r=3, target_modules=both, label_smoothing=0.1, max_grad_norm=UNCLIPPED,
                 batch_size=1, gradient_accumulation_steps=3),
    ]  # fmt: skip


Curves = dict[int, list[Measurement]]


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curves, Path]:
    """The trials on one device, and their folder."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LONGEST_ROW", 0)
        return train_all(build_engine(tiny_llama, SPLITS, **SLOTS), runs(folder)), folder


def assert_same(curves: Curves, folder: Path, others: Curves, other_folder: Path) -> None:
    """The same losses, gradient norms (but for rounding), perplexities, and adapters, to the bit."""
    for number, curve in others.items():
        assert torch.equal(losses(curves[number]), losses(curve))
        assert torch.equal(perplexities(curves[number]), perplexities(curve))
        norms = [torch.tensor([s.grad_norm for m in c for s in m.steps]) for c in (curves[number], curve)]
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
        found, expected = (read_peft(f / str(number) / "adapter")[0] for f in (folder, other_folder))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("recomputed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_devices_give_the_numbers_of_one(
    tiny_llama: Path, tmp_path: Path, whole: tuple[Curves, Path], recomputed: bool
) -> None:
    with two_devices(tiny_llama, recomputed) as engine:
        assert engine.bank.devices == DEVICES
        assert engine.model.devices == (DEVICES[1], DEVICES[0])
        curves = train_all(engine, runs(tmp_path))

    assert_same(curves, tmp_path, *whole)


def test_a_clipped_step_differs_by_the_rounding_of_the_norm_alone(tiny_llama: Path, tmp_path: Path) -> None:
    clipped = {"target_modules": ("all-linear",), "max_grad_norm": 1e-3, "lr": 5e-3}
    whole = train_all(build_engine(tiny_llama, SPLITS), [make_run(tmp_path / "one", **clipped)])
    with two_devices(tiny_llama) as engine:
        split = train_all(engine, [make_run(tmp_path / "two", **clipped)])

    torch.testing.assert_close(losses(split[0]), losses(whole[0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("then_split", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_trial_continues_on_another_number_of_devices(
    tiny_llama: Path, tmp_path: Path, then_split: bool
) -> None:
    folder, run = tmp_path / "whole", runs(tmp_path)[1]
    expected = train_all(build_engine(tiny_llama, SPLITS), runs(folder)[1:2])

    with two_devices(tiny_llama) as split:
        first, second = build_engine(tiny_llama, SPLITS), split
        if not then_split:
            first, second = second, first
        first.admit([run])
        begun = [m for _ in range(100) if not begun_enough(run) for m in first.advance()]
        known = {m.rung: m.perplexity for m in begun}
        rest = train_all(second, [replace(run, perplexities=known)])[run.number]

    assert 0 < len(begun) < len(expected[1])
    assert torch.equal(perplexities([*begun, *rest]), perplexities(expected[1]))
    found, wanted = (read_peft(f / "1" / "adapter")[0] for f in (tmp_path, folder))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def begun_enough(run: TrialRun) -> bool:
    return (Path(run.folder) / "checkpoint").exists()


def test_answers_are_those_of_one_device(tiny_llama: Path) -> None:
    prompts, ends = [[5, 9, 17], [7, 11, 13, 19, 23]], [2]
    expected = generate(build_engine(tiny_llama, SPLITS).model, [None], prompts, ends, 6, 64)

    with two_devices(tiny_llama) as engine:
        assert generate(engine.model, [None], prompts, ends, 6, 64) == expected


def leave_inputs(engine: Engine) -> None:
    for layer in engine.model.decoder.layers:
        layer._forward_pre_hooks.clear()


def leave_plan(engine: Engine) -> None:
    engine.bank.set_plan = lambda plan, _: setattr(engine.bank, "plans", [plan, plan])  # type: ignore[method-assign]


def leave_adapters(engine: Engine) -> None:
    bank = engine.bank
    bank.adapters[0][0] = replace(
        bank.adapters[0][0], **{n: getattr(bank.adapters[-1][0], n) for n in ("a_RD", "grad_a_RD")}
    )


def leave_a_norm(engine: Engine) -> None:
    norm = engine.model.decoder.layers[0].input_layernorm
    norm.forward = type(norm).forward.__get__(norm)
    norm.weight = torch.nn.Parameter(Placed(norm.weight.inner, DEVICES[1]), requires_grad=False)


@pytest.mark.parametrize("mistake", [leave_inputs, leave_plan, leave_adapters, leave_a_norm])
def test_whatever_stays_on_the_wrong_device_is_noticed(
    tiny_llama: Path, tmp_path: Path, mistake: object
) -> None:
    with two_devices(tiny_llama) as engine:
        engine.admit([make_run(tmp_path, target_modules=("all-linear",), dropout=0.1)])
        ((_, _, rows),) = engine._take_pass()
        engine.model.nll([rows])[0].sum().backward()
        mistake(engine)  # type: ignore[operator]

        with pytest.raises(WrongDeviceError, match="cpu:1"):
            engine.model.nll([rows])[0].sum().backward()


def like_a_kernel(product: Callable[..., object]) -> Callable[..., object]:
    """A product that finds what Triton's kernel of that name reads on the device of the tokens."""

    def call(layer: Layer, side: int, x: torch.Tensor, *rest: object) -> object:
        (plan,) = [part for part in rest if isinstance(part, Plan)]
        read = (layer.table_S5, layer.scales_S2, plan.parts_P3, plan.tiles_N3, plan.key_T, plan.threshold_T)
        devices = {tensor.device for tensor in read if tensor is not None}
        if devices != {x.device}:
            raise WrongDeviceError(f"a kernel for {x.device} reads from {devices}")
        return product(layer, side, x, *rest)

    return call


class OnTwo(OnMeta):
    """The CUDA paths without values, each tensor on one of two devices."""

    def __init__(self, model: torch.nn.Module, bank: SlotBank) -> None:
        super().__init__(model, bank)
        self.device = WITHOUT_VALUES[1]

    _upload = PackedModel._upload


def test_the_cuda_paths_keep_to_their_devices_too() -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model("llama", **TINY)
        kinds = {"dtype": torch.bfloat16, "attn_implementation": "varlen_rows"}
        outline = AutoModelForCausalLM.from_config(config, **kinds).requires_grad_(False).eval()

    with spread(outline, device_map(outline, WITHOUT_VALUES), memory="meta"):
        bring_inputs(outline)
        layers = target_layers(outline, ("all-linear",))
        bank = SlotBank(outline, layers, 3, 8, torch.bfloat16, Products(*map(like_a_kernel, PLAIN)))
        for slot in (0, 2):
            bank.admit(slot, SETTINGS, bank.names, seed=slot)
        model = OnTwo(outline, bank)
        torch.cat(model.nll(packs())).sum().backward()
        bank.set_plan = lambda plan, _: setattr(bank, "plans", [plan, plan])  # type: ignore[method-assign]

        with pytest.raises(WrongDeviceError, match="a kernel for cpu:2"):
            model.nll(packs())


@pytest.mark.parametrize(
    "architecture",
    ["gpt2", "gpt_neox", "opt", "gemma2", "gemma3_text", "phi3", "stablelm", "gpt_oss", "qwen3_moe"],
)
def test_layers_of_any_name_get_their_inputs(architecture: str) -> None:
    sizes = {**SIZES, **OWN_SIZES.get(architecture, {}), "num_hidden_layers": 3, "vocab_size": 300}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **sizes), attn_implementation=NAME
    ).eval()

    with spread(model, device_map(model, DEVICES)):
        bring_inputs(model)
        adapt(model)
        check_packing(model, architecture)

    assert describe_split(model) == "cpu:0 (2 layers), cpu:1 (1 layers and the rest)"
