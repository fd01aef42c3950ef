"""Runs that repeat a trial: with an order of rows of their own, or up to one rung whatever it measures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_search.data.order import DataAxis
from lora_search.files.peft import read_peft
from tests.conftest import make_run
from tests.harness import build_engine, random_splits, train_all

SPLITS = random_splits()


def test_a_run_of_its_own_order_trains_as_in_a_sweep_of_that_order(tiny_llama: Path, tmp_path: Path) -> None:
    packed = build_engine(tiny_llama, SPLITS, slots=2)
    plain, other = make_run(tmp_path / "a", 0), replace(make_run(tmp_path / "a", 1), order_seed=7)
    curves = train_all(packed, [plain, other])

    alone = build_engine(tiny_llama, SPLITS)
    alone.axis = DataAxis(SPLITS.train, 7)
    expected = train_all(alone, [make_run(tmp_path / "b", 1)])[1]

    found = [m.perplexity for m in curves[1]]
    assert found == pytest.approx([m.perplexity for m in expected], rel=1e-5)
    in_sweep = train_all(build_engine(tiny_llama, SPLITS), [make_run(tmp_path / "c", 1)])[1]
    assert found != pytest.approx([m.perplexity for m in in_sweep], rel=1e-4)


def test_a_run_up_to_a_rung_keeps_that_rungs_adapter_even_if_an_earlier_one_was_better(
    tiny_llama: Path, tmp_path: Path
) -> None:
    harmful = {"lr": 0.3, "schedule": "constant", "warmup_ratio": 0.0}
    run = replace(make_run(tmp_path / "kept", **harmful), last_rung=3)

    curve = train_all(build_engine(tiny_llama, SPLITS), [run])[0]

    assert [m.rung for m in curve] == [1, 2, 3]
    assert curve[-1].ended == "finished"
    assert curve[-1].perplexity > min(m.perplexity for m in curve), "choose a rate that does more harm"
    _, note = read_peft(tmp_path / "kept/0/adapter")
    assert (note["rung"], note["perplexity"]) == (3, curve[-1].perplexity)


def test_a_run_up_to_a_rung_that_was_interrupted_ends_with_the_same_adapter(
    tiny_llama: Path, tmp_path: Path
) -> None:
    harmful = {"lr": 0.3, "schedule": "constant", "warmup_ratio": 0.0}
    whole, cut = (replace(make_run(tmp_path / name, **harmful), last_rung=3) for name in ("whole", "cut"))
    train_all(build_engine(tiny_llama, SPLITS), [whole])
    engine = build_engine(tiny_llama, SPLITS)
    engine.admit([cut])
    while not [m for m in engine.advance() if m.rung == 2]:
        pass

    curve = train_all(build_engine(tiny_llama, SPLITS), [cut])[0]

    assert [m.rung for m in curve][-1] == 3
    (expected, _), (found, note) = (read_peft(tmp_path / name / "0/adapter") for name in ("whole", "cut"))
    assert note["rung"] == 3
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)
