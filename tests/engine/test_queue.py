"""Trials that wait for memory: in order, none for ever, and with the numbers that they would have had."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_search.engine.engine import Engine
from lora_search.engine.slot import Queue
from lora_search.trial import Measurement, TrialRun
from tests.conftest import make_run
from tests.engine.test_engine import losses
from tests.harness import build_engine, random_splits, train_all

SPLITS = random_splits()
RANKS = (4, 8, 2)


def runs(folder: Path) -> list[TrialRun]:
    return [make_run(folder, number, r=rank) for number, rank in enumerate(RANKS)]


def engine_with(folder: Path, bank_bytes: int | None) -> tuple[Engine, list[tuple[int, ...]]]:
    """Return an engine of three slots, and which trials were in them after each pass."""
    engine, seen = build_engine(folder, SPLITS, slots=3), []
    engine.queue.most_bytes = bank_bytes
    engine.after_pass = lambda: seen.append(tuple(slot.run.number for slot in engine.busy))
    return engine, seen


def bytes_of(engine: Engine, run: TrialRun) -> int:
    return engine.bank.bytes_of(run.settings, engine.resolve_targets(run.settings.target_modules))


def run_out(engine: Engine) -> None:
    while engine.free_slots < len(engine.slots):
        engine.advance()


def finished(curves: dict[int, list[Measurement]]) -> list[int]:
    return [number for number, curve in curves.items() if curve[-1].ended == "finished"]


def test_trials_wait_for_memory_in_their_order_and_are_not_overtaken(
    tiny_llama: Path, tmp_path: Path
) -> None:
    engine, seen = engine_with(tiny_llama, None)
    engine.queue.most_bytes = bytes_of(engine, runs(tmp_path)[1])  # of rank 8: 4 and 2 would fit together

    engine.admit(runs(tmp_path))
    bring = engine.free_slots
    run_out(engine)

    assert bring == 0  # although two slots are empty
    assert list(dict.fromkeys(seen)) == [(0,), (1,), (2,)]
    assert engine.free_slots == 3


def test_trials_share_what_memory_there_is(tiny_llama: Path, tmp_path: Path) -> None:
    engine, seen = engine_with(tiny_llama, None)
    engine.queue.most_bytes = sum(bytes_of(engine, run) for run in runs(tmp_path)[:2])

    curves = train_all(engine, runs(tmp_path))

    assert seen[0] == (0, 1)
    assert finished(curves) == [0, 1, 2]


@pytest.mark.parametrize("bank_bytes", [0, None])
def test_a_trial_that_waited_measures_as_it_does_alone(
    tiny_llama: Path, tmp_path: Path, bank_bytes: int | None
) -> None:
    engine, _ = engine_with(tiny_llama, bank_bytes)

    curves = train_all(engine, runs(tmp_path / "together"))

    for run in runs(tmp_path / "alone"):
        alone = train_all(build_engine(tiny_llama, SPLITS), [run])[run.number]
        torch.testing.assert_close(losses(curves[run.number]), losses(alone), rtol=1e-5, atol=0)


def test_a_trial_that_is_taken_away_while_it_waits_leaves_the_queue(tiny_llama: Path, tmp_path: Path) -> None:
    engine, seen = engine_with(tiny_llama, 0)
    engine.admit(runs(tmp_path))

    engine.release([1])
    run_out(engine)

    assert list(dict.fromkeys(seen)) == [(0,), (2,)]
    assert not (tmp_path / "1").exists()


def hold(engine: Engine, most: int) -> None:
    """Let memory run out when more trials than that come into slots."""
    admit = engine.bank.admit

    def limited(*args: Any) -> None:
        admit(*args)
        if len(engine.bank.rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    engine.bank.admit = limited  # type: ignore[method-assign]


def test_a_trial_for_which_memory_runs_out_waits_for_another_to_leave(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, seen = engine_with(tiny_llama, None)
    hold(engine, 2)

    curves = train_all(engine, runs(tmp_path))

    assert seen[0] == (0, 1)
    assert finished(curves) == [0, 1, 2]
    assert "trial 2 waits: no memory beside the others" in caplog.text


def test_a_trial_for_which_there_is_no_memory_at_all_fails(tiny_llama: Path, tmp_path: Path) -> None:
    engine, _ = engine_with(tiny_llama, None)
    hold(engine, 0)

    curves = train_all(engine, runs(tmp_path))

    assert {m.ended for curve in curves.values() for m in curve} == {"failed"}
    assert "out of memory" in curves[0][0].detail
    assert engine.free_slots == 3
    assert not engine.bank.rows
    assert not engine.optimizer.moments


@pytest.mark.parametrize(("most", "left"), [(None, 59), (100, 59), (40, 40)])
def test_memory_that_ran_out_for_a_large_trial_lets_small_ones_share_what_there_is(
    most: int | None, left: int
) -> None:
    queue, large, small, other = Queue(most), *(SimpleNamespace(num_bytes=n) for n in (50, 10, 10))

    queue.push_back(large, [small])  # type: ignore[list-item, arg-type]

    assert queue.most_bytes == left
    assert queue.next([small]) is None  # type: ignore[list-item]
    assert queue.next([]) is large
    queue.waiting.append(other)  # type: ignore[arg-type]
    assert queue.next([small]) is other  # type: ignore[list-item]
