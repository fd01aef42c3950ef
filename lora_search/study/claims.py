"""The next trial to train: an interrupted one, or a new point of the space; no point twice, no trial beyond
the total."""

import time
from collections.abc import Container, Sequence

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.presence import worker_is_dead
from lora_search.database.storage import (
    explained_errors,
    locked_from_the_start,
    open_storage,
    require_database,
)
from lora_search.database.trial_storage import DrawingStorage
from lora_search.database.trial_table import TrialTable
from lora_search.database.write_once import read_attribute
from lora_search.errors import ConfigError, StudyError
from lora_search.failures import failure_reason
from lora_search.search.sampling import suggest
from lora_search.search.trials import (
    DUPLICATE,
    FINISHED,
    PAUSED,
    SURPLUS,
    UNSIGNED,
    count_of,
    has_run_for,
    is_held_by,
    params_of,
    settings_of,
    text_of,
)
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.settings.space import Space
from lora_search.study.fingerprint import ATTRIBUTE, changed_choices, space_part
from lora_search.study.ledger import Ledger
from lora_search.trial import draw_seed

MAX_DUPLICATES_IN_A_ROW = 50
SIGNING_SECONDS = 0.02  # between two polls of a trial that another worker is drawing


class Draws:
    """Draws trials for one worker until the total is reached or the space is exhausted."""

    def __init__(
        self, config: SweepConfig, space: Space, study: optuna.Study, table: TrialTable, ledger: Ledger
    ) -> None:
        assert isinstance(study._storage, DrawingStorage)
        self.storage = study._storage
        self.config, self.space, self.study, self.table, self.ledger = config, space, study, table, ledger
        self.exhausted = False  # every point of the space was tried before the total was reached
        self.outdated = ""  # why this worker can draw no more: the study has got other choices

    def draw(self, worker: str) -> int | None:
        """Return the number of a RUNNING trial, signed by the worker; None if there is no trial to claim."""
        duplicates = 0
        while duplicates < MAX_DUPLICATES_IN_A_ROW and not self.outdated:
            self.ledger.read()
            self._fail_strangers()
            if not self.has_room():
                return None
            trial = self._ask()
            if trial is None or not self._sign(trial, worker):
                continue  # this worker was so slow that another has taken the trial
            refusal = self._refusal(trial)
            if refusal is None:
                return trial.number
            self._refuse(trial.number, worker, refusal)
            if refusal.startswith(SURPLUS):
                return None
            duplicates += 1
        if self.outdated:
            return None
        self._exhaust(f"{duplicates} points drawn in a row had been tried before")
        return None

    def _ask(self) -> optuna.Trial | None:
        """Return the next trial, with its parameters; None if another worker has ended it, or if another
        program has just enqueued it outside the space."""
        drawn = None
        try:
            with locked_from_the_start(), self.storage.drawing():
                drawn = self.study.ask()
                suggest(drawn, self.space)
        except UpdateFinishedTrialError:
            return None
        except (ValueError, TypeError) as error:
            self.ledger.read()
            if self._fail_strangers() or self._is_outdated(drawn):
                return None
            remedy = "Has another program written to the study? Choose another study.name."
            text = f"study.name: {self.config.study.name!r} draws no trial: {failure_reason(error)}. {remedy}"
            raise StudyError(text) from None
        return None if self._is_outdated(drawn) else drawn

    def _is_outdated(self, drawn: optuna.Trial | None) -> bool:
        """Return whether another start has added choices since this one; then the trial is put back. None are
        added from now on until it has ended: it runs."""
        stored = read_attribute(self.table.storage, self.table.study_id, ATTRIBUTE) or {}
        keys = changed_choices(dict(stored), space_part(self.space))
        if not keys:
            return False
        self.outdated = (
            f"space.{', space.'.join(keys)}: another start has added choices, which this worker does not "
            "know: it ends. Give that start's command here too, to go on with them"
        )
        if drawn is not None:
            self.table.know(drawn.number, drawn._trial_id)
            with self.table.locked(drawn.number) as trial:
                if trial.seen.state == TrialState.RUNNING and not trial.seen.user_attrs.get("worker"):
                    trial.write({}, TrialState.WAITING)
        return True

    def _fail_strangers(self) -> bool:
        """Fail the enqueued trials of other programs that are not in the space; return whether there were
        any."""
        new = [t for t in self.ledger.open if not settings_of(t) and not text_of(t, "worker")]
        strangers = {t.number: why for t in new if (why := self.space.refusal({**t.params, **params_of(t)}))}
        for number, why in strangers.items():
            with self.table.locked(number) as trial:
                if not trial.seen.state.is_finished() and not trial.seen.user_attrs.get("worker"):
                    trial.write({"reason": f"outside the space: {why}"}, TrialState.FAIL)
        if strangers:
            self.ledger.read()
        return bool(strangers)

    def _sign(self, drawn: optuna.Trial, worker: str) -> bool:
        """Sign the trial unless another worker has; return whether it is this worker's. Its parameters and
        first heartbeat are written with the signature, so that a signed trial always has them. One that was
        put back because this took long is taken again: beyond the total nobody else would end it."""
        self.table.know(drawn.number, drawn._trial_id)
        with self.table.locked(drawn.number) as trial:
            is_free = not trial.seen.state.is_finished() and not trial.seen.user_attrs.get("worker")
            if is_free:
                trial.draw(self.storage.drawn)
                trial.write({"worker": worker}, TrialState.RUNNING)
        return is_free or is_held_by(trial.seen, worker)

    def has_room(self) -> bool:
        """Return whether one more trial may be drawn; enqueue an untried point if the sampler repeats. Notes
        it where the space is exhausted."""
        if self.ledger.count(*FINISHED, TrialState.RUNNING) >= self.config.study.most_trials:
            return False
        if self.ledger.count(TrialState.WAITING):
            return True
        has_drawn_twice = self.ledger.last_reason.startswith(DUPLICATE)
        is_grid = self.config.sampler.name == "grid"
        num_points, num_trials = self.space.num_points, self.ledger.num_trials
        if num_points is None or not (is_grid or has_drawn_twice or num_trials >= num_points):
            return True
        untried = self.space.untried(self.ledger.points.values())
        if not untried:
            self._exhaust(f"all {num_points} combinations of the space have been tried")
            return False
        if is_grid or has_drawn_twice:
            self.study.enqueue_trial(untried[draw_seed(self.config.seed, num_trials) % len(untried)])
        return True

    def _refusal(self, trial: optuna.Trial) -> str | None:
        """Return why a new trial must not begin. Lower numbers win: two workers never refuse each other."""
        self._wait_for_signatures(before=trial.number)
        known = self.ledger.find(trial.number)
        if known is None or settings_of(known):
            return None  # another worker has ended it, or it is resumed
        same = self.ledger.first_with(trial.params, before=trial.number)
        if same is not None:
            return f"{DUPLICATE} trial {same}"
        if self.ledger.num_not_failed(before=trial.number) >= self.config.study.most_trials:
            return f"{SURPLUS} another worker took the last place"
        return None

    def _refuse(self, number: int, worker: str, why: str) -> None:
        """Fail the trial, unless this worker was so slow that another has taken it."""
        with self.table.locked(number) as trial:
            if is_held_by(trial.seen, worker):
                trial.write({"reason": why}, TrialState.FAIL)

    def _wait_for_signatures(self, before: int) -> None:
        """Read the study until all trials of lower numbers have their parameters: a worker signs a trial once
        it has drawn them, and may be slower than the one that drew the next trial."""
        seconds = self.config.study.heartbeat_seconds
        unsigned: list[int] = []
        while True:
            self.ledger.read(unsigned)  # an older version signs in place, which a look alone finds late
            running = [t for t in self.ledger.open if t.state == TrialState.RUNNING and t.number < before]
            waiting = [t for t in running if not t.user_attrs.get("worker") and not has_run_for(t, seconds)]
            if not waiting:
                return
            unsigned = [t._trial_id for t in waiting]
            time.sleep(SIGNING_SECONDS)

    def _exhaust(self, why: str) -> None:
        self.exhausted = True
        self.study.set_user_attr("exhausted", why)


def reclaim(
    config: StudyConfig, trials: Sequence[FrozenTrial], table: TrialTable, held: Container[int]
) -> int:
    """Put the trials of dead workers back; return how many. Fails those that were put back too often.

    ``trials``: the unfinished ones. ``held``: the caller's own.
    """
    running = [t for t in trials if t.state == TrialState.RUNNING]
    silent = table.silent_ids()  # read last: a trial claimed again in the meantime is not silent
    nobodys = [t for t in running if t.number not in held and not t.user_attrs.get(PAUSED)]
    stale = [t for t in nobodys if _is_abandoned(config, t, t._trial_id in silent)]
    return sum(_put_back(config, table, trial) for trial in stale)


def reclaim_all(config: StudyConfig) -> None:
    """Put the trials of dead workers back when no worker is left to do so; do nothing without a study."""
    try:
        require_database(config)
    except ConfigError:
        return
    storage = open_storage(config)
    with explained_errors(config):
        if config.name not in optuna.get_all_study_names(storage):
            return
        table = TrialTable(storage, config.name)
        running = storage.get_all_trials(table.study_id, deepcopy=False, states=(TrialState.RUNNING,))
        reclaim(config, running, table, held=())


def _put_back(config: StudyConfig, table: TrialTable, stale: FrozenTrial) -> bool:
    """Put a dead worker's trial back, or fail it if its workers keep dying at the same rung. Return False if
    another worker was faster."""
    with table.locked(stale.number) as trial:
        attributes, worker = trial.seen.user_attrs, stale.user_attrs.get("worker")
        if trial.seen.state != TrialState.RUNNING or attributes.get("worker") != worker:
            return False
        if attributes.get(PAUSED):
            return False
        rung = trial.seen.last_step or 0
        retries = count_of(trial.seen, "retries") + 1 if rung == attributes.get("died_at_rung") else 1
        is_last = retries > config.max_retries
        reason = f"its worker died {retries} times at the same rung" if is_last else "its worker died"
        news = {"retries": retries, "died_at_rung": rung, "reason": reason, **UNSIGNED}
        trial.write(news, TrialState.FAIL if is_last else TrialState.WAITING)
    return True


def _is_abandoned(config: StudyConfig, trial: FrozenTrial, is_silent: bool) -> bool:
    worker = text_of(trial, "worker")
    if not worker:  # its heartbeat, if any, is an earlier worker's
        return has_run_for(trial, config.heartbeat_seconds)
    return is_silent or worker_is_dead(worker)
