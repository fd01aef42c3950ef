"""What a finished study asks of the loaded base: scores of answers, samples, the test score. One worker does
it at a time, on whichever machine; the next one finds what is done. Imports torch."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_search.database.outbox import Outbox
from lora_search.database.presence import GRACE_HEARTBEATS, worker_name
from lora_search.database.storage import explained_errors, open_storage
from lora_search.database.write_once import Turn
from lora_search.engine.engine import Engine
from lora_search.errors import LoraSearchError
from lora_search.output.shared_files import bring_results, bring_shared, share
from lora_search.output.terminal import Progress
from lora_search.results.ranking import best_of
from lora_search.service.answering import score_answers_once
from lora_search.service.samples import keep_samples_once
from lora_search.service.scoring import Finished, score_test_once
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.study.stored_results import has_test_score
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow

POLL_SECONDS = 0.5


def score_and_share(
    config: SweepConfig, rows: Sequence[TrialRow], folder: Path, engine: Engine, progress: Progress,
    check: Callable[[], None],
) -> None:  # fmt: skip
    """Score what no worker has scored yet, and copy the results to artifacts.uri.

    ``check`` is called after every pass and while others are waited for; it may raise.
    """
    bring_results(rows, folder, engine.keeper.artifacts)
    with in_turn(config.study, progress, check) as after_pass:
        if engine.keeper.artifacts is not None and (known := best_of(rows)) is not None:
            bring_shared(known, folder, engine.keeper.artifacts)  # what another worker has just made
        study = Finished(engine, config, folder, progress, after_pass)
        score_answers_once(study)
        rows = rows if config.metric.name == "none" else StudyView(config.study).rows()
        keep_samples_once(study, best_of(rows))
        if not may_change(config.study, engine, rows, progress):
            score_test_once(study, best_of(rows))
        share(folder, engine.keeper.artifacts)


def may_change(config: StudyConfig, engine: Engine, rows: Sequence[TrialRow], progress: Progress) -> bool:
    """Return whether scores that are still lacking may choose another winner, so that the test split must
    wait; say so."""
    lacking = [str(row.number) for row in rows if row.state == "COMPLETE" and row.metric is None]
    if config.choose_by != "metric" or not lacking:
        return False
    if engine.splits.test and not has_test_score(config):
        progress.event(
            f"the test split waits: a trial without a score of its answers ({', '.join(lacking)}) may win. "
            f"Once all have one: lora-search score study.name={config.name}, where the winner's adapter is"
        )
    return True


@contextmanager
def in_turn(
    config: StudyConfig, progress: Progress, check: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """Wait until no other worker of the study is inside; yield what is to be called after every pass."""
    storage, outbox = open_storage(config), Outbox(config)
    with explained_errors(config):
        study_id = storage.get_study_id_from_name(config.name)
    grace = GRACE_HEARTBEATS * config.heartbeat_seconds
    turn = Turn(storage, study_id, "after the search", worker_name(os.getpid()), grace)
    while not outbox.ask(turn.take):
        progress.wait("another worker scores the finished study")
        check()
        time.sleep(POLL_SECONDS)
    with extended(turn, config) as failures:

        def after_pass() -> None:
            check()
            if failures:
                raise failures[0]

        yield after_pass


@contextmanager
def extended(turn: Turn, config: StudyConfig) -> Iterator[list[LoraSearchError]]:
    """Extend the turn from a thread, however long a step inside takes, and give it back at the end. What is
    yielded gets an error once the database was gone for too long."""
    outbox, ended, failures = Outbox(config), threading.Event(), list[LoraSearchError]()

    def extend() -> None:
        try:
            while not ended.wait(config.heartbeat_seconds):
                outbox.ask(turn.extend)
        except LoraSearchError as error:
            failures.append(error)

    thread = threading.Thread(target=extend, daemon=True)
    thread.start()
    try:
        yield failures
    finally:
        ended.set()
        thread.join()
        with suppress(LoraSearchError):  # it ends by itself, some heartbeats later
            outbox.ask(turn.give_back)
