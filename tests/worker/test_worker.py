"""The worker's loop over a real study, with a simulated engine: known curves, one rung a tick."""

import io
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lora_search.errors import StudyError
from lora_search.output.terminal import Progress
from lora_search.settings.schema import PrunerConfig
from lora_search.settings.space import parse_space
from lora_search.study.study import SweepStudy
from lora_search.trial import Measurement, SlotView, TrialRun
from lora_search.worker import worker
from lora_search.worker.interrupts import Interrupts
from lora_search.worker.worker import work
from tests.study.test_study import RUNGS, make_config, measure, open_study, sign_as, states


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

    def drop_checkpoint_copy(self, number: int) -> None:
        """Nothing is copied."""

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

    assert "trial 0 dropped: taken over by another worker" in lines.getvalue()
    assert tracker.ends[0] == "INTERRUPTED"
    assert states(study)["RUNNING"] == 1


def test_a_worker_stays_while_others_train_and_takes_over_what_they_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    config = make_config(tmp_path, n_trials=3)
    other = open_study(config, tmp_path)
    other.trials.worker = "elsewhere:1:1"
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


class TroubledEngine(CurveEngine):
    """Trial 1 fails at its first tick; trial 2 went on from an older checkpoint."""

    def advance(self) -> list[Measurement]:
        ticks = super().advance()
        self.release([1])
        return [TROUBLES.get((m.trial_number, m.rung), lambda m: m)(m) for m in ticks]


TROUBLES = {
    (1, 1): lambda m: replace(m, perplexity=math.nan, ended="failed", detail="TypeError: a bug (in x.py)"),
    (2, 1): lambda m: replace(m, recovery="rung-00003.safetensors is damaged: resumed from rung 2"),
}


def test_a_failed_trial_is_stored_with_its_reason_and_a_recovery_with_its_trial(tmp_path: Path) -> None:
    study, tracker, (progress, lines) = (
        open_study(make_config(tmp_path, n_trials=5, pruner=PrunerConfig(name="none")), tmp_path),
        RecordingTracker(),
        quiet(),
    )

    work(study, TroubledEngine(3), tracker, progress)

    rows = study.rows()
    assert (rows[1].state, rows[1].reason) == ("FAIL", "TypeError: a bug (in x.py)")
    assert rows[1].perplexities == {}
    assert tracker.ends[1] == "FAIL"
    assert "trial 1 failed" in lines.getvalue()
    assert rows[2].recovery == "rung-00003.safetensors is damaged: resumed from rung 2"
    assert study.summary().finished == 5


class BrokenEngine(CurveEngine):
    """Nothing that it is given can be trained."""

    def advance(self) -> list[Measurement]:
        ticks = [replace(m, ended="failed", detail="ValueError: always") for m in super().advance()]
        self.release([m.trial_number for m in ticks])
        return ticks


def test_too_many_failures_in_a_row_end_the_sweep_with_the_last_reason(tmp_path: Path) -> None:
    study, (progress, _) = open_study(make_config(tmp_path), tmp_path), quiet()

    with pytest.raises(
        StudyError, match=r"study.max_failures_in_a_row: 6 trials failed .*ValueError: always"
    ):
        work(study, BrokenEngine(2), RecordingTracker(), progress)

    assert states(study) == {"FAIL": 6}


def test_an_interrupt_hands_the_trials_back_and_closes_the_tracker(tmp_path: Path) -> None:
    study, (progress, _), closed = open_study(make_config(tmp_path), tmp_path), quiet(), threading.Event()
    interrupts = Interrupts()

    class Interrupted(CurveEngine):
        def advance(self) -> list[Measurement]:
            interrupts.has_come = True
            return super().advance()

    tracker = RecordingTracker()
    tracker.close = closed.set
    with pytest.raises(KeyboardInterrupt):
        work(study, Interrupted(2), tracker, progress, interrupts.check)

    assert closed.is_set()
    assert states(study) == {"WAITING": 2}


def test_a_worker_leaves_when_the_budget_is_spent_and_puts_back_what_it_holds(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.study.max_tokens, config.study.n_trials = 1000, None
    known = {"data.train_tokens": "400"}
    study = SweepStudy.open(config, parse_space(config), {"a": "1"}, known, tmp_path)
    tracker, (progress, _) = RecordingTracker(), quiet()

    work(study, CurveEngine(2), tracker, progress)

    rows = study.rows()
    assert 900 < sum(row.train_tokens for row in rows) <= 1000
    assert not any(row.state == "RUNNING" for row in rows)
    assert set(tracker.ends) == {row.number for row in rows if row.perplexities}


def test_two_workers_of_one_budget_both_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    config = make_config(tmp_path)
    config.study.max_tokens, config.study.n_trials = 2000, None
    known = {"data.train_tokens": "400"}
    studies = [SweepStudy.open(config, parse_space(config), {"a": "1"}, known, tmp_path) for _ in range(2)]
    studies[1].trials.worker = "elsewhere:1:1"
    threads = [
        threading.Thread(target=work, args=(study, CurveEngine(2), RecordingTracker(), quiet()[0]))
        for study in studies
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)

    assert not any(thread.is_alive() for thread in threads)
    assert sum(row.train_tokens for row in studies[0].rows()) <= 2000 + 2 * 2 * 100  # a rung of each slot


class NarrowEngine(CurveEngine):
    """Has memory for two trials, whatever its slots; others wait."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self.waiting: list[TrialRun] = []
        self.most_waiting = 0

    @property
    def free_slots(self) -> int:
        return 0 if self.waiting else super().free_slots

    def admit(self, runs: Sequence[TrialRun]) -> None:
        self.waiting += runs
        while self.waiting and len(self.running) < 2:
            super().admit([self.waiting.pop(0)])
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def release(self, numbers: Sequence[int]) -> None:
        super().release(numbers)
        self.waiting = [run for run in self.waiting if run.number not in numbers]

    def advance(self) -> list[Measurement]:
        self.admit([])
        return super().advance()


def test_a_worker_holds_one_trial_at_most_that_waits_for_memory(tmp_path: Path) -> None:
    study, (progress, _), engine = open_study(make_config(tmp_path), tmp_path), quiet(), NarrowEngine(4)

    work(study, engine, RecordingTracker(), progress)

    assert engine.most_waiting == 1
    assert study.summary().finished == 8


def test_a_trial_that_waits_for_memory_is_handed_back_and_trained_later(tmp_path: Path) -> None:
    study, (progress, _), interrupts = open_study(make_config(tmp_path), tmp_path), quiet(), Interrupts()

    class Interrupted(NarrowEngine):
        def advance(self) -> list[Measurement]:
            interrupts.has_come = True
            return super().advance()

    with pytest.raises(KeyboardInterrupt):
        work(study, Interrupted(4), RecordingTracker(), progress, interrupts.check)
    left = states(study)
    again = open_study(make_config(tmp_path), tmp_path)
    work(again, NarrowEngine(4), RecordingTracker(), progress)

    assert left == {"WAITING": 3}
    assert again.summary().finished == 8
