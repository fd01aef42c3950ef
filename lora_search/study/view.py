"""A read-only view of a study: opened once, read as often as needed. Imports no torch."""

import json
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.changes import Changes
from lora_search.database.presence import worker_is_dead
from lora_search.database.storage import explained_errors, open_storage, require_database
from lora_search.errors import ConfigError
from lora_search.search.trials import progress_of, settings_of, settled, text_of, trial_rows
from lora_search.settings.schema import StudyConfig
from lora_search.study.answer_metric import with_metric
from lora_search.study.budget import Spent, described, limits, read_intervals, spent_of
from lora_search.study.ledger import Ledger
from lora_search.study.opening_checks import check_adoptable
from lora_search.study.provenance import attributes_of
from lora_search.trial import SlotView, StudySummary, TrialRow, TrialSettings


class StudyView:
    """Raises ConfigError if the study does not exist, StudyError if its database cannot be read."""

    def __init__(self, config: StudyConfig) -> None:
        require_database(config)
        check_adoptable(config)
        self.config = config
        self._storage = storage = open_storage(config)
        with explained_errors(config):
            if config.name not in optuna.get_all_study_names(storage):
                raise ConfigError(
                    "study.name", config.name, "must be a study in study.storage", "Run the sweep first."
                )
            self._study = optuna.load_study(study_name=config.name, storage=storage)
            self._study_id = storage.get_study_id_from_name(config.name)
        self._ledger = Ledger(Changes(storage, self._study_id).read, self._study.pruner)

    def rows(self) -> list[TrialRow]:
        """Return every trial that began or will begin, by number."""
        trials = self._trials()
        return with_metric(trial_rows(trials), trials, self._study)

    def summary(self) -> StudySummary:
        """Return the progress of the study."""
        with explained_errors(self.config):
            self._ledger.read()
            return self._ledger.summary(self.config.n_trials, limits(self.config, self._spent()))

    def slots(self) -> list[SlotView]:
        """Return the running trials of all workers, best first, each as of its last rung."""
        running = [t for t in self._trials() if t.state == TrialState.RUNNING]
        views = [_slot(t, settings) for t in running if (settings := _settings(t)) is not None]
        return sorted(views, key=lambda slot: (slot.perplexity is None, slot.perplexity, slot.trial_number))

    def attributes(self) -> dict[str, str]:
        """Return the study's attributes and what it has spent."""
        with explained_errors(self.config):
            self._ledger.read()
            return attributes_of(self._study) | described(self.config, self._spent())

    def workers(self) -> dict[str, bool]:
        """Return the workers that hold running trials, each with whether it is known to be dead."""
        running = [t for t in self._trials() if t.state == TrialState.RUNNING]
        names = [text_of(trial, "worker") for trial in running]
        return {name: worker_is_dead(name) for name in names if name}

    def _spent(self) -> Spent:
        intervals = read_intervals(self._storage, self._study_id).values()
        return spent_of(list(intervals), self._ledger.tokens)

    def settings_of(self, number: int) -> TrialSettings:
        """Return one trial's settings. Raises ConfigError if the trial does not exist."""
        found = next((t for t in self._trials() if t.number == number), None)
        settings = None if found is None else _settings(found)
        if settings is None:
            rule = f"must be a trial of study {self.config.name!r} that has begun"
            raise ConfigError("trial", number, rule, "`lora-search status` lists them.")
        return settings

    def _trials(self) -> Sequence[FrozenTrial]:
        with explained_errors(self.config):
            return [settled(trial) for trial in self._study.get_trials(deepcopy=False)]


def _settings(trial: FrozenTrial) -> TrialSettings | None:
    """Return the trial's settings; None before it begins, or if another program has overwritten them."""
    try:
        return TrialSettings.from_record(json.loads(settings_of(trial)))
    except (ValueError, TypeError, KeyError):
        return None


def study_names(config: StudyConfig) -> list[str]:
    """Return the names of all studies in the storage."""
    require_database(config)
    with explained_errors(config):
        return sorted(optuna.get_all_study_names(open_storage(config)))


def delete_study(config: StudyConfig) -> None:
    """Delete the study from its storage permanently."""
    with explained_errors(config):
        optuna.delete_study(study_name=config.name, storage=open_storage(config))


def _slot(trial: FrozenTrial, settings: TrialSettings) -> SlotView:
    rung, examples = trial.last_step or 0, progress_of(trial)["examples_seen"]
    return SlotView(
        trial_number=trial.number,
        settings=settings,
        rung=rung,
        examples_seen=examples,
        next_rung_examples=examples * (rung + 1) // max(1, rung),
        loss=None,
        perplexity=trial.intermediate_values.get(rung),
    )
