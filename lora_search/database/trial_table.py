"""The trials of one study as rows of the database.

The check whether a trial may be written, and the write, are one transaction with the row locked: no other
worker takes or ends the trial in between, and a worker that is too late writes nothing. Optuna's own storage
uses two transactions.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime

from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyModel,
    TrialModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
)
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.orm import Session

from lora_search.database.storage import locked_from_the_start


class TrialTable:
    """Finds trials by their number in the study."""

    def __init__(self, storage: RDBStorage, study_name: str) -> None:
        self.storage = storage
        self.study_id = storage.get_study_id_from_name(study_name)
        self._ids: dict[int, int] = {}  # trial number -> its id in the database

    def id_of(self, number: int) -> int:
        """Return the trial's id in the database."""
        if number not in self._ids:
            self._ids[number] = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)
        return self._ids[number]

    def beat(self, number: int) -> None:
        """Record that the trial's worker is alive."""
        self.storage.record_heartbeat(self.id_of(number))

    def silent_ids(self) -> set[int]:
        """Return the ids of running trials whose worker has sent no heartbeat for too long."""
        # Optuna's public fail_stale_trials would also fail them; only its query is needed.
        return set(self.storage._get_stale_trial_ids(self.study_id))

    @contextmanager
    def locked(self, number: int) -> Iterator["LockedTrial"]:
        """Lock the trial against other writers. The writes of the block are committed together at its end.
        Inside it, make no other query."""
        trial_id = self.id_of(number)
        with self._transaction() as session:
            row = TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            yield LockedTrial(self.storage, session, row, trial_id)

    def enqueue_first(self, points: Sequence[Mapping[str, object]]) -> bool:
        """Enqueue a study's first trials; return False if it has trials. Only one of many starts does it.
        Parameters that a point lacks are drawn."""
        fixed = [{"fixed_params": dict(params)} for params in points]
        first = [create_trial(state=TrialState.WAITING, system_attrs=attributes) for attributes in fixed]
        with self._transaction() as session:
            StudyModel.find_or_raise_by_id(self.study_id, session, for_update=True)  # as each new trial does
            if session.query(TrialModel).filter_by(study_id=self.study_id).first() is not None:
                return False
            for trial in first:
                self.storage._get_prepared_new_trial(self.study_id, trial, session)
        return True

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with locked_from_the_start(), Session(self.storage.engine) as session, session.begin():
            yield session


class LockedTrial:
    """A trial that no other process can change; ``seen`` is its state when it was locked."""

    def __init__(self, storage: RDBStorage, session: Session, row: TrialModel, trial_id: int) -> None:
        self._storage, self._session, self._row, self._id = storage, session, row, trial_id
        self.seen: FrozenTrial = storage._build_frozen_trial_from_trial_model(row)

    def report(self, rung: int, perplexity: float) -> None:
        """Write an intermediate value."""
        self._storage._set_trial_intermediate_value_without_commit(self._session, self._id, rung, perplexity)

    def annotate(self, key: str, value: object) -> None:
        """Set a user attribute of a trial that may have ended: Optuna's own way refuses those."""
        table, text = TrialUserAttributeModel, json.dumps(value)
        found = self._session.query(table).filter_by(trial_id=self._id, key=key).one_or_none()
        if found is None:
            self._session.add(table(trial_id=self._id, key=key, value_json=text))
        else:
            found.value_json = text

    def keep(self, key: str, text: str) -> None:
        """Set a system attribute, which optuna-dashboard does not show."""
        self._storage._set_trial_attr_without_commit(
            self._session, TrialSystemAttributeModel, self._id, key, text
        )

    def write(
        self, attributes: Mapping[str, object], state: TrialState | None = None, value: float | None = None
    ) -> None:
        """Set user attributes and, if given, the state. A PRUNED trial gets the value of its last rung."""
        for key, attribute in attributes.items():
            self._storage._set_trial_attr_without_commit(
                self._session, TrialUserAttributeModel, self._id, key, attribute
            )
        if state == TrialState.PRUNED and self.seen.last_step is not None:
            value = self.seen.intermediate_values[self.seen.last_step]
        if value is not None and value == value:  # not NaN
            self._storage._set_trial_value_without_commit(self._session, self._row, 0, value)
        if state is not None:
            self._row.state = state
            if state.is_finished():
                self._row.datetime_complete = datetime.now()
