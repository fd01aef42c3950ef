"""Running out of memory, for real and injected: the numbers stay the same."""

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_search.data.preparation import prepare
from lora_search.engine import build as assembly
from lora_search.engine.build import Room
from lora_search.engine.packed_model import PackedModel, SlotRows
from lora_search.errors import LoraSearchError
from lora_search.model.loading import load_base, load_tokenizer, resolve_model
from lora_search.ops.device import available_bytes, is_out_of_memory
from lora_search.output.tracking import NoTracker
from lora_search.reading.load import load_rows
from lora_search.settings.composition import compose
from lora_search.settings.space import parse_space
from lora_search.study.study import SweepStudy
from lora_search.trial import TrialRow
from lora_search.worker.worker import work
from tests.conftest import make_run
from tests.engine.test_engine import losses, mixed_runs, perplexities
from tests.harness import build_engine, random_splits, train_all
from tests.worker.test_worker import quiet

SPLITS = random_splits()


class SmallDevice(PackedModel):
    """A model on a device that holds so many tokens: training fails half way back, evaluation on the way."""

    max_tokens = 60

    def nll(self, packs: list[SlotRows]) -> list[torch.Tensor]:
        if sum(pack.num_tokens for pack in packs) <= self.max_tokens:
            return super().nll(packs)
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        hook = self.decoder.layers[0].register_forward_hook(fail_on_the_way_back)
        nlls = super().nll(packs)
        hook.remove()
        return nlls


def fail_on_the_way_back(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
    output.register_hook(fail)


def fail(_: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_pass_that_runs_out_of_memory_is_repeated_with_the_same_numbers(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = train_all(build_engine(tiny_llama, SPLITS, slots=4), mixed_runs(tmp_path / "a"))
    engine = build_engine(tiny_llama, SPLITS, slots=4, tokens_per_pass=200)
    engine.model.__class__ = SmallDevice

    curves = train_all(engine, mixed_runs(tmp_path / "b"))

    assert engine.tokens_per_pass == 50
    assert "out of memory: passes of 50 tokens from now on" in caplog.text
    for number, curve in expected.items():
        torch.testing.assert_close(losses(curves[number]), losses(curve), rtol=1e-5, atol=0)
        torch.testing.assert_close(perplexities(curves[number]), perplexities(curve), rtol=1e-5, atol=0)


def smoke_sweep(folder: Path, device: type[PackedModel]) -> tuple[list[TrialRow], int]:
    """Run the smoke sweep on a device of that kind; return its trials and the tokens per pass at its end."""
    own = [f"runs_dir={folder}", f"study.storage=sqlite:///{folder}/study.db", "study.n_trials=2"]
    config = compose("smoke", [*own, "engine.device=cpu", "sampler=random", "pruner=none"])
    space, source = parse_space(config), resolve_model(config.model)
    splits = prepare(config, load_rows(config.data), load_tokenizer(source, config.model))
    base = load_base(source, config.model, config.engine)
    engine, _ = assembly.build_engine(config, Room.of_space(config, space), base, splits, {})
    engine.model.__class__ = device
    study = SweepStudy.open(config, space, {}, {}, folder)
    work(study, engine, NoTracker(), quiet()[0])
    return study.rows(), engine.tokens_per_pass


def test_a_sweep_that_runs_out_of_memory_measures_as_if_it_had_not(tmp_path: Path) -> None:
    expected, all_tokens = smoke_sweep(tmp_path / "large", PackedModel)

    rows, few_tokens = smoke_sweep(
        tmp_path / "small", type("Device", (SmallDevice,), {"max_tokens": all_tokens // 5})
    )

    assert few_tokens == all_tokens // 8
    assert {row.state for row in rows} == {"COMPLETE"}
    assert [(row.number, row.state, row.params, row.best_rung) for row in rows] == [
        (row.number, row.state, row.params, row.best_rung) for row in expected
    ]
    for row, other in zip(rows, expected, strict=True):
        assert row.perplexities == pytest.approx(other.perplexities, rel=1e-5)


def tensor_bytes() -> int:
    """Return the bytes of all tensors that are alive, each storage once. Stand-ins have none of their own."""
    gc.collect()
    alive = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def test_memory_returns_to_its_baseline_after_every_trial(tiny_llama: Path, tmp_path: Path) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=2)
    train_all(engine, [make_run(tmp_path, 0)])  # what is made once is made by now
    baseline = tensor_bytes()

    after = []
    for number, rank in enumerate((8, 2, 4), start=1):
        train_all(engine, [make_run(tmp_path, number, r=rank, dropout=0.1)])
        after.append(tensor_bytes())

    assert after == [baseline] * 3


def test_a_row_that_does_not_fit_alone_fails_its_trial_with_the_remedy(
    tiny_llama: Path, tmp_path: Path
) -> None:
    engine = build_engine(tiny_llama, SPLITS)
    engine.model.__class__ = type("Tiny", (SmallDevice,), {"max_tokens": 5})

    (last,) = train_all(engine, mixed_runs(tmp_path)[:1])[0]

    assert last.ended == "failed"
    assert re.search(r"out of memory with a single row .* Lower data.max_length", last.detail)


def test_a_base_that_does_not_fit_is_one_clear_message(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, SPLITS)
    engine.model.__class__ = type("Tiny", (SmallDevice,), {"max_tokens": 5})

    with pytest.raises(LoraSearchError, match=r"out of memory with a single row .* Lower data.max_length"):
        engine.evaluate_base()


class BigRankTooBig(PackedModel):
    """A device on which a trial of large rank never fits, and the others always do."""

    def nll(self, packs: list[SlotRows]) -> list[torch.Tensor]:
        if any(pack.slot == 1 for pack in packs):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().nll(packs)


def test_a_trial_that_never_fits_fails_alone_and_the_others_keep_their_numbers(
    tiny_llama: Path, tmp_path: Path
) -> None:
    expected = train_all(build_engine(tiny_llama, SPLITS), [make_run(tmp_path / "a", 0)])
    engine = build_engine(tiny_llama, SPLITS, slots=2)
    engine.model.__class__ = BigRankTooBig

    curves = train_all(engine, [make_run(tmp_path / "b", 0), make_run(tmp_path / "b", 1, r=8)])

    assert [m.ended for m in curves[1]] == ["failed"]
    torch.testing.assert_close(losses(curves[0]), losses(expected[0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory"),
    ],
    ids=str,
)
def test_out_of_memory_is_recognised_in_every_form(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_a_pass_repeats_after_an_error_of_the_device_that_only_means_memory(
    tiny_llama: Path, tmp_path: Path
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=2)

    assert engine._explain(torch.AcceleratorError("CUDA error: out of memory")) is None
    with pytest.raises(LoraSearchError, match="the device failed"):
        engine._explain(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


def test_what_the_cpu_says_when_memory_ends_is_understood() -> None:
    code = (
        "import resource, torch\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))\n"
        "try: torch.empty(2**34)\n"
        "except RuntimeError as error:\n"
        "    from lora_search.ops.device import is_out_of_memory\n"
        "    print(is_out_of_memory(error), is_out_of_memory(RuntimeError('shapes differ')))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )

    assert done.stdout.split() == ["True", "False"]
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert 0 < available_bytes([torch.device("cpu")]) < 2**50
