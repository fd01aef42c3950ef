"""What goes wrong with one trial ends that trial only, with its reason; the others keep their numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_search.engine.engine import Engine
from lora_search.engine.packed_model import PackedModel, SlotRows
from lora_search.engine.slot import Slot
from lora_search.engine.trial_folder import Keeper
from lora_search.errors import LoraSearchError
from lora_search.trial import Measurement, RowScores, TrialRun
from tests.conftest import make_run
from tests.engine.test_engine import losses, perplexities
from tests.harness import build_engine, random_splits, train_all

SPLITS = random_splits()
SICK = 1  # the number of the trial that fails, and its slot


def is_sick(packs: Sequence[SlotRows]) -> bool:
    return any(pack.slot == SICK for pack in packs)


class FailsForward(PackedModel):
    def nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        if torch.is_grad_enabled() and is_sick(packs):
            raise TypeError("a bug on the way forward")
        return super().nll(packs)


class FailsBackward(PackedModel):
    def nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        hook = self.decoder.layers[0].register_forward_hook(fail_on_the_way_back)
        nlls = super().nll(packs) if is_sick(packs) and torch.is_grad_enabled() else None
        hook.remove()
        return super().nll(packs) if nlls is None else nlls


class FailsAtEvaluation(PackedModel):
    def nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        if not torch.is_grad_enabled() and is_sick(packs):
            raise IndexError("a bug in the evaluation")
        return super().nll(packs)


class LosesTheDevice(PackedModel):
    def nll(self, packs: Sequence[SlotRows]) -> list[torch.Tensor]:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore words")


def fail_on_the_way_back(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
    output.register_hook(fail)


def fail(_: torch.Tensor) -> None:
    raise ValueError("a bug on the way back")


class CannotExport(Keeper):
    def keep_best(self, index: int, slot: Slot, scores: RowScores) -> None:
        if slot.run.number == SICK:
            raise OverflowError("a bug in the export")
        super().keep_best(index, slot, scores)


def healthy(folder: Path) -> TrialRun:
    return make_run(folder, 0, dropout=0.1)


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Measurement]:
    return train_all(build_engine(tiny_llama, SPLITS), [healthy(tmp_path_factory.mktemp("alone"))])[0]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (FailsForward, "TypeError: a bug on the way forward (in engine.py, _losses, line "),
        (FailsBackward, "ValueError: a bug on the way back (in engine.py, _losses, line "),
    ],
)
def test_a_trial_that_breaks_a_shared_pass_fails_alone_and_its_neighbour_never_notices(
    tiny_llama: Path, tmp_path: Path, alone: list[Measurement], model: type[PackedModel], reason: str
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=2)
    engine.model.__class__ = model

    curves = train_all(engine, [healthy(tmp_path), make_run(tmp_path, SICK)])

    assert [m.ended for m in curves[SICK]] == ["failed"]
    assert curves[SICK][0].detail.startswith(reason)
    assert losses(curves[0]).tolist() == losses(alone).tolist()  # the very first pass was taken apart
    assert perplexities(curves[0]).tolist() == perplexities(alone).tolist()


def test_a_pass_that_breaks_later_is_repeated_with_the_same_numbers(
    tiny_llama: Path, tmp_path: Path, alone: list[Measurement]
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=2)
    engine.admit([healthy(tmp_path), make_run(tmp_path, SICK)])
    curve = [m for _ in range(4) for m in engine.advance()]
    engine.model.__class__ = FailsForward

    curve += finish(engine)

    assert [m.ended for m in curve if m.trial_number == SICK][-1] == "failed"
    rest = [m for m in curve if m.trial_number == 0]
    torch.testing.assert_close(losses(rest), losses(alone), rtol=1e-5, atol=0)


def finish(engine: Engine) -> list[Measurement]:
    curve: list[Measurement] = []
    while engine.free_slots < len(engine.slots):
        curve += engine.advance()
    return curve


def release_instead(folder: Path, tmp_path: Path, num_passes: int) -> list[Measurement]:
    """Train both trials and take the second one out after so many passes: nothing has failed here."""
    engine = build_engine(folder, SPLITS, slots=2, tokens_per_pass=200)
    engine.admit([healthy(tmp_path), make_run(tmp_path, SICK)])
    curve = [m for _ in range(num_passes) for m in engine.advance()]
    engine.release([SICK])
    return [m for m in curve + finish(engine) if m.trial_number == 0]


def test_a_trial_that_fails_in_its_step_leaves_the_neighbours_exactly_as_they_were(
    tiny_llama: Path, tmp_path: Path
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=2, tokens_per_pass=200)
    sick = make_run(tmp_path / "a", SICK, beta1="0.9")  # a string: the optimizer cannot subtract it

    curves = train_all(engine, [healthy(tmp_path / "a"), sick])

    assert [m.ended for m in curves[SICK]] == ["failed"]
    assert "TypeError: unsupported operand type" in curves[SICK][0].detail
    assert "in optim.py, _step_part, line" in curves[SICK][0].detail
    expected = release_instead(tiny_llama, tmp_path / "b", num_passes=1)
    assert losses(curves[0]).tolist() == losses(expected).tolist()
    assert perplexities(curves[0]).tolist() == perplexities(expected).tolist()


def test_a_trial_that_fails_in_its_export_leaves_the_neighbours_exactly_as_they_were(
    tiny_llama: Path, tmp_path: Path
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=2, tokens_per_pass=200)
    engine.keeper = CannotExport(engine.bank, engine.optimizer, engine.keeper.base)

    curves = train_all(engine, [healthy(tmp_path / "a"), make_run(tmp_path / "a", SICK)])

    assert [m.ended for m in curves[SICK]] == ["failed"]
    assert curves[SICK][0].detail.startswith("OverflowError: a bug in the export (in ")
    expected = release_instead(tiny_llama, tmp_path / "b", num_passes=2)
    assert losses(curves[0]).tolist() == losses(expected).tolist()


def test_a_trial_that_breaks_a_shared_evaluation_fails_alone(
    tiny_llama: Path, tmp_path: Path, alone: list[Measurement]
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=2)
    engine.model.__class__ = FailsAtEvaluation

    curves = train_all(engine, [healthy(tmp_path), make_run(tmp_path, SICK)])

    assert [m.ended for m in curves[SICK]] == ["failed"]
    assert curves[SICK][0].detail.startswith("IndexError: a bug in the evaluation")
    torch.testing.assert_close(perplexities(curves[0]), perplexities(alone), rtol=1e-5, atol=0)


def test_a_trial_that_cannot_be_admitted_fails_and_gives_its_slot_back(
    tiny_llama: Path, tmp_path: Path, alone: list[Measurement]
) -> None:
    engine = build_engine(tiny_llama, SPLITS)
    sick = make_run(tmp_path, SICK, alpha=np.float32(8.0))  # no JSON can hold it

    curves = train_all(engine, [sick, healthy(tmp_path)])

    assert [(m.ended, m.rung) for m in curves[SICK]] == [("failed", 0)]
    assert "TypeError: Object of type float32 is not JSON serializable" in curves[SICK][0].detail
    assert losses(curves[0]).tolist() == losses(alone).tolist()


def test_a_lost_device_ends_the_sweep_and_blames_no_trial(tiny_llama: Path, tmp_path: Path) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=2)
    engine.model.__class__ = LosesTheDevice

    with pytest.raises(
        LoraSearchError, match="engine.device: the device failed: CUDA error: .* triggered. The"
    ):
        train_all(engine, [healthy(tmp_path), make_run(tmp_path, SICK)])


def test_a_loss_that_is_not_finite_is_noticed_at_its_step_and_not_only_at_the_rung(
    tiny_llama: Path, tmp_path: Path
) -> None:
    engine = build_engine(tiny_llama, SPLITS)
    run = make_run(tmp_path, alpha=1e38, lr=0.9, target_modules=("all-linear",), evals_per_epoch=1, epochs=4)

    (last,) = train_all(engine, [run])[0]

    assert last.ended == "diverged"
    assert last.detail.startswith("loss or gradient not finite at optimizer step ")
    assert last.rung == 1
    assert len(last.steps) < 3  # the rung is at the third step


def test_a_callback_after_each_pass_hears_of_training_and_of_every_part_of_an_evaluation(
    tiny_llama: Path, tmp_path: Path
) -> None:
    engine = build_engine(tiny_llama, SPLITS, tokens_per_pass=24)
    calls: list[bool] = []
    engine.after_pass = lambda: calls.append(torch.is_grad_enabled())
    engine.admit([healthy(tmp_path)])
    measured: list[Measurement] = []

    while not measured:
        measured = engine.advance()

    assert calls.count(False) >= 4  # an evaluation of 5 rows in passes of 24 tokens
    assert calls.count(True) >= 4


def test_a_trial_that_is_released_after_its_pass_is_neither_stepped_nor_written(
    tiny_llama: Path, tmp_path: Path
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=2, tokens_per_pass=200)
    engine.admit([healthy(tmp_path), make_run(tmp_path, SICK)])
    engine.after_pass = lambda: engine.release([SICK])

    curve = finish(engine)

    assert {m.trial_number for m in curve} == {0}
    assert not (tmp_path / str(SICK)).exists()
