"""One process on one device: claims trials, trains them in its slots, reports. Decides every trial's fate."""

from collections.abc import Sequence

from lora_search.engine import Engine
from lora_search.progress import Progress
from lora_search.study import SweepStudy
from lora_search.tracking import Tracker
from lora_search.trial import Measurement


def work(study: SweepStudy, engine: Engine, tracker: Tracker, progress: Progress) -> None:
    """Train until no trial is left to claim. Whatever ends it early, held trials go back to the study
    first."""
    try:
        while _admit(study, engine, tracker):
            measurements = engine.advance()
            study.heartbeat()
            if measurements:
                _settle(measurements, study, engine, tracker, progress)
            progress.update(engine.views(), study.summary(), engine.tokens_per_second)
    finally:
        study.hand_back("interrupted; its checkpoint is kept")
        tracker.close()


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
        study.prune(stop)
        engine.release([stop.trial_number])
        tracker.finish(stop.trial_number, "PRUNED", stop.reason)
        progress.event(f"trial {stop.trial_number} pruned at {stop.reason}")
