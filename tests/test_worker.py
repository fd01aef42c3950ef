"""The worker's loop over a real study, with a simulated engine: known curves, one rung a tick."""

import io
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from lora_search import worker
from lora_search.progress import Progress
from lora_search.trial import Measurement, SlotView, TrialRun
from lora_search.worker import work
from tests.test_study import RUNGS, make_config, measure, open_study, sign_as, states


class CurveEngine:
    """Trains nothing: every held trial reaches its next rung at each tick."""

    def __init__(self, num_slots: int) -> None:
        self.slots: list[object] = [None] * num_slots
        self.running: dict[int, tuple[TrialRun, int]] = {}
        self.tokens_per_second = 1.0

    @property
    def free_slots(self) -> int:
        return len(self.slots) - len(self.running)

    def admit(self, runs: Sequence[TrialRun]) -> None:
        self.running |= {run.number: (run, 0) for run in runs}

    def release(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.running.pop(number, None)

    def advance(self) -> list[Measurement]:
        self.running = {number: (run, rung + 1) for number, (run, rung) in self.running.items()}
        ticks = [
            measure(run, rung, "finished" if rung == RUNGS else None) for run, rung in self.running.values()
        ]
        self.release([m.trial_number for m in ticks if m.ended])
        return ticks

    def views(self) -> list[SlotView]:
        return []


class RecordingTracker:
    def __init__(self) -> None:
        self.ends: dict[int, str] = {}

    def start(self, run: TrialRun) -> None: ...

    def log(self, measurement: Measurement) -> None: ...

    def finish(self, trial_number: int, state: str, reason: str) -> None:
        self.ends[trial_number] = state

    def close(self) -> None: ...


def quiet() -> tuple[Progress, io.StringIO]:
    lines = io.StringIO()
    return Progress(Console(file=lines, width=200)), lines


def test_every_trial_ends_and_its_tracker_hears_how(tmp_path: Path) -> None:
    study, tracker, (progress, lines) = (
        open_study(make_config(tmp_path), tmp_path),
        RecordingTracker(),
        quiet(),
    )

    work(study, CurveEngine(3), tracker, progress)

    assert study.summary().finished == 8
    assert tracker.ends == {row.number: row.state for row in study.rows()}
    assert "pruned at rung" in lines.getvalue()


def test_a_trial_that_was_taken_over_is_let_go_and_not_called_pruned(tmp_path: Path) -> None:
    study, tracker, (progress, lines) = (
        open_study(make_config(tmp_path), tmp_path),
        RecordingTracker(),
        quiet(),
    )

    class Robbed(CurveEngine):
        def advance(self) -> list[Measurement]:
            ticks = super().advance()
            if 0 in study.held:
                sign_as(study, 0, "elsewhere:1:1")
                study.num_running_elsewhere = lambda: 0
            return ticks

    work(study, Robbed(2), tracker, progress)

    assert "trial 0 let go: taken over by another worker" in lines.getvalue()
    assert tracker.ends[0] == "INTERRUPTED"
    assert states(study)["RUNNING"] == 1


def test_a_worker_stays_while_others_train_and_takes_over_what_they_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    config = make_config(tmp_path, n_trials=3)
    other = open_study(config, tmp_path)
    other.worker = "elsewhere:1:1"
    left = other.claim(1)[0]
    study, (progress, lines) = open_study(config, tmp_path), quiet()
    waits = threading.Event()
    progress.wait = lambda text: (progress.event(text), waits.set())
    thread = threading.Thread(target=work, args=(study, CurveEngine(2), RecordingTracker(), progress))

    thread.start()
    assert waits.wait(timeout=60)
    other.hand_back("its machine goes away")
    thread.join(timeout=60)

    assert "waiting for 1 trials of other workers" in lines.getvalue()
    assert study.summary().finished == 3
    assert study.rows()[left.number].state in ("COMPLETE", "PRUNED")
