"""Which trial is next: one that was interrupted, or a new point of the space; none twice, none beyond the
total."""

import time
from collections.abc import Callable, Container, Sequence

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.presence import worker_is_dead
from lora_search.database.storage import (
    explained_errors,
    locked_from_the_start,
    open_storage,
    require_database,
)
from lora_search.errors import ConfigError
from lora_search.search.trials import DUPLICATE, FINISHED, PAUSED, SURPLUS, has_run_for, params_of
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.settings.space import Space
from lora_search.study.ledger import Ledger
from lora_search.trial import draw_seed

MAX_DUPLICATES_IN_A_ROW = 50
SIGNING_SECONDS = 0.02  # between two looks at a trial that another worker is drawing


class Draws:
    """Draws trials for one worker until the total is reached or the space is exhausted."""

    def __init__(self, config: SweepConfig, space: Space, study: optuna.Study, ledger: Ledger) -> None:
        self.config, self.space, self.study, self.ledger = config, space, study, ledger
        self.exhausted = False

    def draw(self, sign: Callable[[optuna.Trial], None]) -> optuna.Trial | None:
        """Return a RUNNING trial, signed by its worker; None when there is none to be had."""
        for _ in range(MAX_DUPLICATES_IN_A_ROW):
            self.ledger.read(everything=True)
            if not self._has_room(self.ledger.trials):
                return None
            with locked_from_the_start():
                trial = self.study.ask(self.space.distributions)
            sign(trial)
            refusal = self._refusal(trial)
            if refusal is None:
                return trial
            self._refuse(trial, refusal)
            if refusal.startswith(SURPLUS):
                return None
        self._exhaust(f"{MAX_DUPLICATES_IN_A_ROW} draws in a row had been tried before")
        return None

    def _has_room(self, trials: Sequence[FrozenTrial]) -> bool:
        """Return whether one more trial may be drawn; steer the draw to an untried point where needed."""
        if self.ledger.count(*FINISHED, TrialState.RUNNING) >= self.config.study.n_trials:
            return False
        if self.ledger.count(TrialState.WAITING):
            return True
        has_drawn_twice = bool(trials) and str(trials[-1].user_attrs.get("reason", "")).startswith(DUPLICATE)
        is_grid = self.config.sampler.name == "grid"
        num_points = self.space.num_points()
        if num_points is None or not (is_grid or has_drawn_twice or len(trials) >= num_points):
            return True
        untried = self.space.untried(params_of(t) for t in trials)
        if not untried:
            self._exhaust(f"all {num_points} combinations of the space have been tried")
            return False
        if is_grid or has_drawn_twice:
            self.study.enqueue_trial(untried[draw_seed(self.config.seed, len(trials)) % len(untried)])
        return True

    def _refusal(self, trial: optuna.Trial) -> str | None:
        """Return why a new trial must not begin. Lower numbers win: two workers never refuse each other."""
        self._wait_for_signatures(before=trial.number)
        if "settings" in self.ledger.find(trial.number).user_attrs:
            return None  # it began before, and goes on
        same = self.ledger.first_with(trial.params, before=trial.number)
        if same is not None:
            return f"{DUPLICATE} trial {same}"
        if self.ledger.num_not_failed(before=trial.number) >= self.config.study.n_trials:
            return f"{SURPLUS} another worker took the last place"
        return None

    def _refuse(self, trial: optuna.Trial, why: str) -> None:
        """End the trial, unless this worker was so slow that another took the trial from it."""
        self.ledger.read(everything=True)
        if self.ledger.find(trial.number).state == TrialState.RUNNING:
            trial.set_user_attr("reason", why)
            self.study.tell(trial, state=TrialState.FAIL)

    def _wait_for_signatures(self, before: int) -> None:
        """Read the study once the trials of lower numbers have their parameters: a worker signs a trial when
        it has drawn them, and may be slower than the one that drew the next."""
        seconds = self.config.study.heartbeat_seconds
        while True:
            self.ledger.read()
            running = [t for t in self.ledger.open if t.state == TrialState.RUNNING and t.number < before]
            if all(t.user_attrs.get("worker") or has_run_for(t, seconds) for t in running):
                return
            time.sleep(SIGNING_SECONDS)

    def _exhaust(self, why: str) -> None:
        self.exhausted = True
        self.study.set_user_attr("exhausted", why)


def reclaim(
    config: StudyConfig,
    study: optuna.Study,
    storage: RDBStorage,
    held: Container[int],
    id_of: Callable[[int], int],
) -> int:
    """Put back the trials of dead workers; return how many. Fails those that were put back too often.

    ``held`` are the caller's own; ``id_of`` maps a trial's number to its id in the database.
    """
    study_id = storage.get_study_id_from_name(study.study_name)
    # Optuna's public fail_stale_trials would end them for good; only the query behind it is needed.
    silent = set(storage._get_stale_trial_ids(study_id))
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    nobodys = [t for t in running if t.number not in held and not t.user_attrs.get(PAUSED)]
    stale = [t for t in nobodys if _is_abandoned(config, t, id_of(t.number) in silent)]
    for trial in stale:
        _put_back(config, storage, trial, id_of(trial.number))
    return len(stale)


def reclaim_all(config: StudyConfig) -> None:
    """Put back what dead workers hold, where nobody else is left to do it; without a study, do nothing."""
    try:
        require_database(config)
    except ConfigError:
        return
    storage = open_storage(config)
    with explained_errors(config):
        if config.name not in optuna.get_all_study_names(storage):
            return
        study = optuna.load_study(study_name=config.name, storage=storage)
        study_id = storage.get_study_id_from_name(config.name)
        reclaim(
            config, study, storage, (),
            lambda number: storage.get_trial_id_from_study_id_trial_number(study_id, number),
        )  # fmt: skip


def _put_back(config: StudyConfig, storage: RDBStorage, trial: FrozenTrial, trial_id: int) -> None:
    """Let a dead worker's trial be claimed again, or fail it where its workers die at the same place."""
    now = storage.get_trial(trial_id)
    if now.state != TrialState.RUNNING or now.user_attrs.get("worker") != trial.user_attrs.get("worker"):
        return  # another worker was quicker
    rung, before = now.last_step or 0, now.user_attrs.get("died_at_rung")
    retries = int(now.user_attrs.get("retries", 0)) + 1 if rung == before else 1
    is_last = retries > config.max_retries
    storage.record_heartbeat(trial_id)  # so that no other worker finds it stale as well
    storage.set_trial_user_attr(trial_id, "retries", retries)
    storage.set_trial_user_attr(trial_id, "died_at_rung", rung)
    reason = f"its worker died {retries} times, no rung between" if is_last else "its worker died"
    storage.set_trial_user_attr(trial_id, "reason", reason)
    storage.set_trial_user_attr(trial_id, "worker", "")  # or who draws it next would look dead until it signs
    storage.set_trial_state_values(trial_id, TrialState.FAIL if is_last else TrialState.WAITING)


def _is_abandoned(config: StudyConfig, trial: FrozenTrial, is_silent: bool) -> bool:
    worker = trial.user_attrs.get("worker")
    if not worker:  # a heartbeat, if there is one, is an earlier worker's
        return has_run_for(trial, config.heartbeat_seconds)
    return is_silent or worker_is_dead(worker)
