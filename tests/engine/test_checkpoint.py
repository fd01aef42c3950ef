"""Checkpoints and adapters on the disk: damaged for real, and what the trial then does."""

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lora_search.engine.engine import Engine
from lora_search.engine.trial_folder import START
from lora_search.files.checkpoint import load_checkpoint, save_checkpoint
from lora_search.files.tensors import DamagedFileError, read_sealed, write_sealed
from lora_search.trial import Measurement, TrialRun
from tests.conftest import make_run
from tests.engine.test_engine import losses, perplexities, plain_perplexity
from tests.harness import build_engine, random_splits, train_all

SPLITS = random_splits()
STATE = {"theta/a": torch.arange(6.0).view(2, 3), "m/a": torch.zeros(4)}
OWN_BEST = {"dropout": 0.1, "lr": 5e-3}  # its best rung is its last
WITH_DORA = {**OWN_BEST, "use_dora": True}
EARLY_BEST = {
    "dropout": 0.1,
    "lr": 0.05,
    "alpha": 16.0,
    "schedule": "constant",
    "target_modules": ("all-linear",),
}  # its best rung is an early one
WITH_OLORA = {**OWN_BEST, "init": "olora", "trainable_token_indices": (7, 40)}
WITH_PISSA = {**EARLY_BEST, "init": "pissa", "lr": 0.1}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_byte_of_a_value(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


def flip_a_byte_of_the_position(path: Path) -> None:
    raw = path.read_bytes()
    assert raw.count(b"optimizer_steps") == 1
    path.write_bytes(raw.replace(b"optimizer_steps", b"optimizer_stepz"))


def write_something_else(path: Path) -> None:
    path.write_bytes(b"no safetensors at all" * 99)


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("executed",)


def write_a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil()))


def write_a_torch_pickle(path: Path) -> None:
    torch.save({"theta/a": Evil()}, path)


def write_other_shapes(path: Path) -> None:
    """Seal a checkpoint anew with one row less in every tensor."""
    state, note = read_sealed(path)
    write_sealed(path, {name: tensor[:-1] for name, tensor in state.items()}, note)


DAMAGES = [
    truncate,
    empty,
    flip_a_byte_of_a_value,
    flip_a_byte_of_the_position,
    write_something_else,
    write_a_pickle,
    write_a_torch_pickle,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_noticed_named_and_the_one_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    for rung in (1, 2, 3):
        save_checkpoint(tmp_path, replace(START, rung=rung, curve=((4, 9.5),)), STATE)
    damage(tmp_path / "rung-00003.safetensors")

    found, troubles = load_checkpoint(tmp_path)

    assert found is not None
    assert found[0] == replace(START, rung=2, curve=((4, 9.5),))
    assert torch.equal(found[1]["theta/a"], STATE["theta/a"])
    assert len(troubles) == 1
    assert troubles[0].startswith("rung-00003.safetensors ")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "rung-00002.safetensors", "rung-00003.safetensors.damaged",
    ]  # fmt: skip


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for rung in (8, 9, 10, 11):
        save_checkpoint(tmp_path, replace(START, rung=rung), STATE)

    assert sorted(p.name for p in tmp_path.iterdir()) == ["rung-00010.safetensors", "rung-00011.safetensors"]


def test_another_trials_checkpoint_is_never_used(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, replace(START, rung=1), STATE, origin="seed 1")

    found, troubles = load_checkpoint(tmp_path, ["seed 2"])

    assert found is None
    assert troubles == [
        "rung-00001.safetensors belongs to another study, or to a trial with other settings, data or base"
    ]


def test_a_file_that_was_never_sealed_is_damaged(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "plain.safetensors")

    with pytest.raises(DamagedFileError, match="SHA-256 differs"):
        read_sealed(tmp_path / "plain.safetensors")
    with pytest.raises(DamagedFileError, match="does not exist"):
        read_sealed(tmp_path / "nothing.safetensors")


def build(folder: Path) -> Engine:
    return build_engine(folder, SPLITS)


def train_until(engine: Engine, run: TrialRun, rung: int) -> list[Measurement]:
    """Train one trial up to a rung, and leave it there: as a kill does."""
    engine.admit([run])
    curve: list[Measurement] = []
    while not curve or curve[-1].rung < rung:
        curve += engine.advance()
    return curve


def finish(engine: Engine) -> list[Measurement]:
    curve: list[Measurement] = []
    while engine.free_slots < len(engine.slots):
        curve += engine.advance()
    return curve


def as_known(run: TrialRun, curve: list[Measurement]) -> TrialRun:
    """Return the trial as the study hands it out again."""
    return replace(run, perplexities={m.rung: m.perplexity for m in curve})


def adapter_note(run: TrialRun) -> dict[str, object]:
    with safe_open(Path(run.folder) / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["note"])


def perplexity_of_adapter(folder: Path, run: TrialRun) -> float:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    plain = PeftModel.from_pretrained(base, str(Path(run.folder) / "adapter"))
    return plain_perplexity(plain, SPLITS.validation)


@pytest.fixture(
    scope="module",
    params=[OWN_BEST, EARLY_BEST, WITH_DORA, WITH_OLORA, WITH_PISSA],
    ids=["best last", "best early", "DoRA", "OLoRA with tokens", "PiSSA, best early"],
)
def changes(request: pytest.FixtureRequest) -> dict[str, object]:
    changes: dict[str, object] = request.param
    return changes


@pytest.fixture(scope="module")
def undisturbed(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object]
) -> list[Measurement]:
    return train_all(build(tiny_llama), [make_run(tmp_path_factory.mktemp("whole"), **changes)])[0]


def test_the_two_trials_have_their_best_rungs_where_the_tests_need_them(
    undisturbed: list[Measurement], changes: dict[str, object]
) -> None:
    assert undisturbed[-1].best_rung == (4 if changes in (OWN_BEST, WITH_DORA) else 1)


@pytest.mark.parametrize(
    ("damaged", "recovery"),
    [
        ([], ""),
        ([3], "rung-00003.safetensors cannot be read .*: resumed from rung 2"),
        (
            [2, 3],
            "rung-00003.* cannot be read .*; rung-00002.* cannot be read .*: restarted from the beginning",
        ),
    ],
    ids=["whole", "last damaged", "both damaged"],
)
def test_a_resumed_trial_goes_on_bitwise_and_its_adapter_is_the_best_rung(
    tiny_llama: Path,
    tmp_path: Path,
    undisturbed: list[Measurement],
    changes: dict[str, object],
    damaged: list[int],
    recovery: str,
) -> None:
    run = make_run(tmp_path, **changes)
    before = train_until(build(tiny_llama), run, 3)
    for rung in damaged:
        truncate(Path(run.folder) / "checkpoint" / f"rung-{rung:05d}.safetensors")
    engine = build(tiny_llama)
    engine.admit([as_known(run, before)])
    best_so_far = min(before, key=lambda m: m.perplexity)
    held_meanwhile = adapter_note(run)["rung"]

    rest = finish(engine)

    first = rest[0].rung
    assert first == {0: 4, 1: 3, 2: 1}[len(damaged)]
    assert re.fullmatch(recovery, rest[0].recovery)
    assert held_meanwhile == best_so_far.rung
    assert rest[-1].best_rung == adapter_note(run)["rung"] == undisturbed[-1].best_rung
    assert losses(rest).tolist() == losses(undisturbed[first - 1 :]).tolist()
    assert perplexities(rest).tolist() == perplexities(undisturbed[first - 1 :]).tolist()
    expected = pytest.approx(undisturbed[-1].best_perplexity, rel=1e-5)
    assert perplexity_of_adapter(tiny_llama, run) == expected


def test_a_checkpoint_of_other_shapes_is_not_used(
    tiny_llama: Path, tmp_path: Path, undisturbed: list[Measurement], changes: dict[str, object]
) -> None:
    run = make_run(tmp_path, **changes)
    before = train_until(build(tiny_llama), run, 2)
    write_other_shapes(Path(run.folder) / "checkpoint" / "rung-00002.safetensors")
    engine = build(tiny_llama)
    engine.admit([as_known(run, before)])

    rest = finish(engine)

    assert "has other layers or shapes than the trial: resumed from rung 1" in rest[0].recovery
    assert perplexities(rest).tolist() == perplexities(undisturbed[1:]).tolist()


def test_a_kill_between_adapter_and_checkpoint_leaves_the_adapter_that_the_study_says(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, **OWN_BEST)
    before = train_until(build(tiny_llama), run, 2)
    (Path(run.folder) / "checkpoint" / "rung-00002.safetensors").unlink()  # adapter/ is of rung 2 already
    assert adapter_note(run)["rung"] == 2
    engine = build(tiny_llama)

    engine.admit([as_known(run, before[:1])])

    assert adapter_note(run)["rung"] == 1
    assert perplexity_of_adapter(tiny_llama, run) == pytest.approx(before[0].perplexity, rel=1e-5)
    assert finish(engine)[0].perplexity == before[1].perplexity


def test_an_adapter_that_is_lost_comes_back_with_its_rung_and_is_told(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, **OWN_BEST)
    before = train_until(build(tiny_llama), run, 3)
    for path in (Path(run.folder) / "checkpoint").iterdir():
        empty(path)
    flip_a_byte_of_a_value(Path(run.folder) / "adapter" / "adapter_model.safetensors")
    engine = build(tiny_llama)
    engine.admit([as_known(run, before)])

    rest = finish(engine)

    assert "the adapter of rung 3 is lost until that rung is trained again" in rest[0].recovery
    assert adapter_note(run)["rung"] == 4


def test_rungs_that_were_kept_but_never_reported_are_measured_again_for_the_study(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, **OWN_BEST)
    before = train_until(build(tiny_llama), run, 3)
    engine = build(tiny_llama)
    engine.admit([as_known(run, before[:1])])

    told = engine.advance()

    assert [(m.rung, m.perplexity, m.best_rung, m.examples_seen, m.ended) for m in told[:2]] == [
        (m.rung, m.perplexity, m.best_rung, m.examples_seen, None) for m in before[1:]
    ]


def test_a_new_trial_takes_nothing_from_a_folder_that_another_study_left(
    tiny_llama: Path, tmp_path: Path
) -> None:
    train_until(build(tiny_llama), make_run(tmp_path, lr=1e-4), 2)
    expected = train_all(build(tiny_llama), [make_run(tmp_path / "clean", lr=9e-3)])[0]

    curve = train_all(build(tiny_llama), [make_run(tmp_path, lr=9e-3)])[0]

    assert "belongs to another study, or to a trial with other settings, data or base" in curve[0].recovery
    assert perplexities(curve).tolist() == perplexities(expected).tolist()
