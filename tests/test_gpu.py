"""The CUDA paths on a real GPU. Their twins and shapes are tested everywhere, in `test_cuda_paths` and beside
the CPU's; `python -m tests.benchmarks.gpu` measures their speed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_search.ops.attention import _one_row, kernel
from lora_search.ops.dropout import compiled_drop, kept, masked, pair_keys, threshold, token_keys
from lora_search.ops.fused import compiled_gate, gated, gated_backward
from tests.conftest import make_run
from tests.engine.test_engine import differences, losses, mixed_runs
from tests.harness import build_engine, random_splits, train_all

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SPLITS = random_splits()
GPU = torch.device("cuda")


def test_in_float32_packed_equals_solo_and_the_cpu(tiny_llama: Path, tmp_path: Path) -> None:
    on_cpu = train_all(build_engine(tiny_llama, SPLITS), mixed_runs(tmp_path / "cpu"))
    solo = train_all(build_engine(tiny_llama, SPLITS, device="cuda"), mixed_runs(tmp_path / "solo"))

    engine = build_engine(tiny_llama, SPLITS, slots=4, tokens_per_pass=200, device="cuda")
    packed = train_all(engine, mixed_runs(tmp_path / "packed"))

    for number, curve in solo.items():
        torch.testing.assert_close(losses(packed[number]), losses(curve), rtol=1e-5, atol=0)
        torch.testing.assert_close(losses(curve), losses(on_cpu[number]), rtol=1e-4, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus_give_the_numbers_of_one(tiny_llama: Path, tmp_path: Path, dtype: str) -> None:
    own = {"slots": 4, "tokens_per_pass": 200, "device": "cuda", "dtype": dtype}
    whole = train_all(build_engine(tiny_llama, SPLITS, **own), mixed_runs(tmp_path / "one"))

    engine = build_engine(tiny_llama, SPLITS, **own, devices=2)
    split = train_all(engine, mixed_runs(tmp_path / "two"))

    assert {str(device) for device in engine.bank.devices} == {"cuda:0", "cuda:1"}
    for number, curve in whole.items():
        torch.testing.assert_close(losses(split[number]), losses(curve), rtol=1e-5, atol=0)


def test_in_bfloat16_packing_changes_as_little_as_rounding_does(tiny_llama: Path, tmp_path: Path) -> None:
    exact = train_all(build_engine(tiny_llama, SPLITS, device="cuda"), mixed_runs(tmp_path / "exact"))
    own = {"dtype": "bfloat16", "device": "cuda"}
    solo = train_all(build_engine(tiny_llama, SPLITS, **own), mixed_runs(tmp_path / "solo"))

    engine = build_engine(tiny_llama, SPLITS, slots=4, tokens_per_pass=200, **own)
    packed = train_all(engine, mixed_runs(tmp_path / "packed"))

    assert engine.num_shared == 3, "the kernel takes rows with fewer queries than keys as it should"
    packing, rounding = differences(packed, solo), differences(solo, exact)
    assert packing.abs().mean() <= 2 * rounding.abs().mean()
    assert packing.abs().max() <= 4 * rounding.abs().max()


@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_for_rows_of_any_length_equals_one_row_after_the_other(window: int | None) -> None:
    lengths, key_lengths = (5, 1, 9), (5, 7, 12)
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(lengths), 64)
    key, value = torch.randn(2, 1, 2, sum(key_lengths), 64)
    rows = zip(query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2), strict=True)
    expected = torch.cat([_one_row(q, k, v, None, window) for q, k, v in rows], 2).transpose(1, 2)
    bounds = [torch.tensor([0, *n], device=GPU).cumsum(0, dtype=torch.int32) for n in (lengths, key_lengths)]

    half = (x.to(GPU, torch.bfloat16) for x in (query, key, value))
    found = kernel(*half, (bounds[0], bounds[1]), (max(lengths), max(key_lengths)), None, window)

    torch.testing.assert_close(found.float().cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_dropout_drops_the_same_to_the_bit(dtype: torch.dtype) -> None:
    keys = token_keys(3, [4, 9], [200, 57])
    thresholds = torch.full((257,), threshold(0.05), dtype=torch.int16)
    x = torch.randn(257, 97).to(dtype)

    compiled = compiled_drop(GPU, dtype)

    assert compiled is not None
    found = compiled(x.to(GPU), keys.to(GPU), thresholds.to(GPU), pair_keys(5, 49, GPU))
    assert torch.equal(found.cpu(), masked(x, kept(keys, thresholds, 5, 97)))


def test_memory_returns_to_its_baseline_after_every_trial(tiny_llama: Path, tmp_path: Path) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=2, dtype="bfloat16", device="cuda")
    train_all(engine, [make_run(tmp_path, 0, dropout=0.1)])  # what is made once is made by now
    baseline = torch.cuda.memory_allocated()

    after = []
    for number, rank in enumerate((8, 2, 4), start=1):
        train_all(engine, [make_run(tmp_path, number, r=rank, dropout=0.1)])
        after.append(torch.cuda.memory_allocated())

    assert max(after) <= baseline


def test_the_smoke_sweep_runs_with_everything_chosen_by_the_probe(tmp_path: Path) -> None:
    own = ["engine=gpu", "engine.dtype=auto", f"runs_dir={tmp_path}"]
    own.append(f"study.storage=sqlite:///{tmp_path}/study.db")

    done = subprocess.run(
        [sys.executable, "-m", "lora_search.sweep", "-cn", "smoke", *own],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "8/8 trials" in done.stdout or "8 of 8" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_mlps_are_compiled_on_cuda(dtype: torch.dtype) -> None:
    assert compiled_gate(GPU, dtype) != (gated, gated_backward)
