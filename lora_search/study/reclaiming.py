"""Trials whose worker is gone: put back in line, for any worker to go on with from their checkpoint.

A worker on this host is gone when its process is, one on another host when its heartbeat has stopped.
"""

from collections.abc import Callable, Container

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.storage import explained_errors, open_storage, require_database, worker_is_dead
from lora_search.errors import ConfigError
from lora_search.search.pruning import PAUSED
from lora_search.settings.schema import StudyConfig
from lora_search.study.claims import has_run_for


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
