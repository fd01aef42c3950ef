"""One process on one device: claims trials, trains them in its slots, reports. Decides how every trial ends;
docs/failures.md has the table. While the database is unreachable, it continues to train but does not claim or
prune."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lora_search.database.outbox import Outbox
from lora_search.engine.engine import Engine
from lora_search.errors import StudyError
from lora_search.output.terminal import Progress
from lora_search.output.tracking import Tracker
from lora_search.study.study import SweepStudy
from lora_search.trial import Measurement, Stop, StudySummary, TrialRun

POLL_SECONDS = 2.0  # between two polls of other workers' trials
NAP_SECONDS = 0.5  # between two checks for signals while the worker waits


def work(
    study: SweepStudy,
    engine: Engine,
    tracker: Tracker,
    progress: Progress,
    check_interrupt: Callable[[], None] = lambda: None,
) -> None:
    """Train until the study is finished or a budget is spent. If anything ends it early, held trials are put
    back first.

    ``check_interrupt`` is called after every pass and may raise.
    """
    worker = Worker(study, engine, tracker, progress, check_interrupt)
    engine.after_pass = worker.keep_alive  # a heartbeat cannot wait for a whole evaluation
    try:
        while not study.budget.is_over and (worker.admit() or worker.others_train()):
            measurements = engine.advance()
            worker.keep_alive()
            worker.settle(measurements)
            worker.show()
        if study.draws.outdated:
            progress.event(study.draws.outdated)
    finally:
        worker.leave()


@dataclass
class Worker:
    """The state of one worker between two passes."""

    study: SweepStudy
    engine: Engine
    tracker: Tracker
    progress: Progress
    check_interrupt: Callable[[], None]
    summary: StudySummary | None = None
    _claims: bool = False

    def __post_init__(self) -> None:
        self.outbox = Outbox(self.study.config.study)

    def admit(self) -> bool:
        """Fill the free slots; return whether this worker has anything to do."""
        if self.engine.free_slots and self.outbox.flush():
            self.study.check_failures()
            self._fill(self.engine.free_slots)
        if self.study.held and self.engine.free_slots == len(self.engine.slots):
            self._wait(self.outbox.seconds_to_next_try)  # all trials have ended, and reports are pending
        return bool(self.study.held)

    def _fill(self, most: int) -> None:
        """Claim and admit up to so many trials, one by one: one that must wait for memory is the last."""
        for _ in range(most):
            runs = self.outbox.ask(self._claim) if self.engine.free_slots else None
            if not runs:
                return
            for run in runs:
                self.tracker.start(run)
            self.engine.admit(runs)

    def _claim(self) -> list[TrialRun]:
        """Claim one trial: of several at once, some would be lost in a database error."""
        if self._claims:
            self.study.trials.put_back_unheld()
        self._claims = True
        self._count_slots()
        runs = self.study.claim(1)
        self._claims = False
        return runs

    def others_train(self) -> bool:
        """Wait a moment if other workers still train: this one takes the trials of a worker that dies."""
        others = self.outbox.ask(self.study.num_running_elsewhere)
        if others is None:
            self._wait(self.outbox.seconds_to_next_try)
        elif others:
            self.progress.wait(f"waiting for {others} trials of other workers")
            self._wait(POLL_SECONDS)
        return others is None or others > 0

    def keep_alive(self) -> None:
        """Send a heartbeat, after every pass. After a gap other workers may have taken some trials: those are
        dropped before anything more is written for them."""
        self.check_interrupt()
        if self.study.was_silent:
            for number in self.outbox.ask(self.study.trials.drop_lost) or ():
                self._let_go(number, "taken over by another worker while this one was silent")
        self.outbox.ask(self.study.heartbeat)

    def settle(self, measurements: Sequence[Measurement]) -> None:
        """Write all reports, end the trials that are finished, and only then ask which others to stop."""
        if measurements:
            self.outbox.put(partial(self._report, [m for m in measurements if m.ended != "failed"]))
        for m in measurements:
            self.outbox.put(partial(self._follow, m))
        if self.outbox.flush() and measurements:
            for stop in self.outbox.ask(self._judge) or ():
                self.engine.release([stop.trial_number])
                self.outbox.put(partial(self._stop, stop))
            self.outbox.flush()
            self._keep_to_budget([m.trial_number for m in measurements if not m.ended])

    def _judge(self) -> list[Stop]:
        self._count_slots()
        return self.study.judge()

    def _count_slots(self) -> None:
        """Tell the study how many trials this worker can train: fewer where one waits for memory."""
        self.study.num_slots = len(self.study.held) + self.engine.free_slots

    def _keep_to_budget(self, at_rung: Sequence[int]) -> None:
        """Put back the trials at a rung that cannot reach the next one within the budget."""
        for stop in self.outbox.ask(partial(self.study.beyond_budget, at_rung)) or ():
            self.engine.release([stop.trial_number])
            self.outbox.put(partial(self.study.put_back, stop))
            self.tracker.finish(stop.trial_number, "INTERRUPTED", stop.reason)
            self.progress.event(f"trial {stop.trial_number} put back: {stop.reason}")
        self.outbox.flush()

    def _report(self, measurements: Sequence[Measurement]) -> None:
        self.study.report([m for m in measurements if m.trial_number in self.study.held])

    def _follow(self, m: Measurement) -> None:
        """Log what is in the study by now, and end the trial if it is finished."""
        if m.trial_number not in self.study.held:
            return
        if m.recovery:
            self.study.trials.note(m.trial_number, {"recovery": m.recovery})
        state = self._end(m) if m.ended else ""
        if m.ended != "failed":
            self.tracker.log(m)
        if state:
            self.engine.drop_checkpoint_copy(m.trial_number)
            self.tracker.finish(m.trial_number, state, m.detail)
            text = f"trial {m.trial_number} {m.ended}: best perplexity {m.best_perplexity:.3f} {m.detail}"
            self.progress.event(text.rstrip())

    def _end(self, m: Measurement) -> str:
        return self.study.fail(m.trial_number, m.detail) if m.ended == "failed" else self.study.finish(m)

    def _stop(self, stop: Stop) -> None:
        if stop.trial_number not in self.study.held:
            return
        if self.study.prune(stop) == "PRUNED":
            self.engine.drop_checkpoint_copy(stop.trial_number)
            self.tracker.finish(stop.trial_number, "PRUNED", stop.reason)
            self.progress.event(f"trial {stop.trial_number} pruned at {stop.reason}")
        else:
            self._let_go(stop.trial_number, stop.reason)

    def _let_go(self, number: int, reason: str) -> None:
        self.engine.release([number])
        self.tracker.finish(number, "INTERRUPTED", reason)
        self.progress.event(f"trial {number} dropped: {reason}")

    def show(self) -> None:
        """Show the progress of the study, as of the database's last answer."""
        self.summary = self.outbox.ask(self.study.summary) or self.summary
        if self.summary is not None:
            self.progress.update(self.engine.views(), self.summary, self.engine.tokens_per_second)

    def leave(self) -> None:
        """Put the held trials back and close the tracker, also if the database is unreachable."""
        try:
            if self.outbox.ask(self._hand_back) is None and self.study.held:
                held = ", ".join(str(number) for number in sorted(self.study.held))
                self.progress.event(f"the database is unreachable; the next start resumes trials {held}")
        except StudyError:
            self.progress.event("the database is unreachable; the next start resumes the held trials")
        finally:
            self.tracker.close()

    def _hand_back(self) -> bool:
        self.study.hand_back("interrupted; its checkpoint is kept")
        return True

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check_interrupt()
            time.sleep(min(left, NAP_SECONDS))
