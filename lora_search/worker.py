"""One process on one device: claims trials, trains them in its slots, reports. Decides every trial's fate."""

import time
from collections.abc import Sequence

from lora_search.engine import Engine
from lora_search.progress import Progress
from lora_search.study import SweepStudy
from lora_search.tracking import Tracker
from lora_search.trial import Measurement

POLL_SECONDS = 2.0  # between two looks at what other workers do


def work(study: SweepStudy, engine: Engine, tracker: Tracker, progress: Progress) -> None:
    """Train until the study is through. Whatever ends it early, held trials go back to the study first."""
    try:
        while _admit(study, engine, tracker) or _others_train(study, progress):
            if engine.free_slots == len(engine.slots):
                continue
            measurements = engine.advance()
            study.heartbeat()
            if measurements:
                _settle(measurements, study, engine, tracker, progress)
            progress.update(engine.views(), study.summary(), engine.tokens_per_second)
    finally:
        study.hand_back("interrupted; its checkpoint is kept")
        tracker.close()


def _others_train(study: SweepStudy, progress: Progress) -> bool:
    """Wait a while if other workers still train: one that dies leaves its trials to this one."""
    others = study.num_running_elsewhere()
    if others:
        progress.wait(f"waiting for {others} trials of other workers")
        time.sleep(POLL_SECONDS)
    return others > 0


def _admit(study: SweepStudy, engine: Engine, tracker: Tracker) -> bool:
    """Fill the free slots; return whether any slot is busy."""
    if engine.free_slots:
        study.check_failures()
        runs = study.claim(engine.free_slots)
        for run in runs:
            tracker.start(run)
        engine.admit(runs)
    return engine.free_slots < len(engine.slots)


def _settle(
    measurements: Sequence[Measurement],
    study: SweepStudy,
    engine: Engine,
    tracker: Tracker,
    progress: Progress,
) -> None:
    """Write all reports, end the trials that are through, and only then ask which others to stop."""
    study.report(measurements)
    for m in measurements:
        tracker.log(m)
        if m.ended is not None:
            state = study.finish(m)
            tracker.finish(m.trial_number, state, m.detail)
            text = f"trial {m.trial_number} {m.ended}: best perplexity {m.best_perplexity:.3f} {m.detail}"
            progress.event(text.rstrip())
    for stop in study.judge():
        engine.release([stop.trial_number])
        if study.prune(stop) == "PRUNED":
            tracker.finish(stop.trial_number, "PRUNED", stop.reason)
            progress.event(f"trial {stop.trial_number} pruned at {stop.reason}")
        else:
            tracker.finish(stop.trial_number, "INTERRUPTED", stop.reason)
            progress.event(f"trial {stop.trial_number} let go: {stop.reason}")
