"""The trials of one study as rows of the database.

The check whether a trial may be written, and the write, are one transaction with the row locked: no other
worker takes or ends the trial in between, and a worker that is too late writes nothing. Optuna's own storage
uses two transactions.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    NOT_FOUND_MSG,
    StudyModel,
    TrialHeartbeatModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import Table, delete, func, insert, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from lora_search.database.storage import locked_from_the_start
from lora_search.database.trial_reader import TRIALS, read_trials, table_of

PARAMS, VALUES, BEATS = map(table_of, (TrialParamModel, TrialValueModel, TrialHeartbeatModel))
ATTRIBUTES, KEPT = map(table_of, (TrialUserAttributeModel, TrialSystemAttributeModel))
RUNGS = table_of(TrialIntermediateValueModel)


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

    def know(self, number: int, trial_id: int) -> None:
        """Keep the id of a trial that was read elsewhere."""
        self._ids[number] = trial_id

    def beat(self, numbers: Iterable[int]) -> None:
        """Record that the worker of these trials is alive."""
        ids = [self.id_of(number) for number in numbers]
        if ids:
            with self._transaction() as connection:
                _beat(connection, ids)

    def silent_ids(self) -> set[int]:
        """Return the ids of running trials whose worker has sent no heartbeat for too long."""
        grace = timedelta(seconds=self.storage.grace_period or 0)
        running = select(BEATS.c.trial_id, BEATS.c.heartbeat).join(TRIALS)
        mine = TRIALS.c.study_id == self.study_id, TRIALS.c.state == TrialState.RUNNING
        with self.storage.engine.connect() as connection:
            now = connection.execute(select(func.now())).scalar_one().replace(tzinfo=None)
            beats = connection.execute(running.where(*mine)).all()
        return {trial_id for trial_id, heartbeat in beats if now - heartbeat > grace}

    @contextmanager
    def locked(self, number: int) -> Iterator["LockedTrial"]:
        """Lock the trial against other writers. The writes of the block are committed together at its end.
        Inside it, make no other query."""
        with self.all_locked([number]) as trials:
            yield trials[number]

    @contextmanager
    def all_locked(self, numbers: Iterable[int]) -> Iterator[dict[int, "LockedTrial"]]:
        """Lock several trials, by number, in one transaction, in as many statements as one."""
        ids = [self.id_of(number) for number in numbers]
        with self._transaction() as connection:
            found = read_trials(connection, ids, lock=True)
            if len(found) < len(ids):
                raise KeyError(NOT_FOUND_MSG)
            trials = {trial.number: LockedTrial(trial) for trial in found}
            yield trials
            _write(connection, list(trials.values()))

    def enqueue_first(self, points: Sequence[Mapping[str, object]]) -> bool:
        """Enqueue a study's first trials; return False if it has trials. Only one of many starts does it.
        Parameters that a point lacks are drawn."""
        fixed = [{"fixed_params": dict(params)} for params in points]
        first = [create_trial(state=TrialState.WAITING, system_attrs=attributes) for attributes in fixed]
        with locked_from_the_start(), Session(self.storage.engine) as session, session.begin():
            StudyModel.find_or_raise_by_id(self.study_id, session, for_update=True)  # as each new trial does
            if session.query(TrialModel).filter_by(study_id=self.study_id).first() is not None:
                return False
            for trial in first:
                self.storage._get_prepared_new_trial(self.study_id, trial, session)
        return True

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with locked_from_the_start(), self.storage.engine.begin() as connection:
            yield connection


class LockedTrial:
    """A trial that no other process can change; ``seen`` is what it was when it was locked. Its writes wait
    for the end of the block."""

    def __init__(self, trial: FrozenTrial) -> None:
        self.seen, self.id = trial, trial._trial_id
        self.rungs: dict[int, float] = {}
        self.params: dict[str, tuple[float, BaseDistribution]] = {}
        self.attributes: dict[str, object] = {}
        self.kept: dict[str, object] = {}
        self.state: TrialState | None = None
        self.value: float | None = None
        self.beats = False

    def report(self, rung: int, perplexity: float) -> None:
        """Write an intermediate value, which the trial has not got yet."""
        self.rungs[rung] = perplexity

    def draw(self, params: Mapping[str, tuple[float, BaseDistribution]]) -> None:
        """Write the parameters that were drawn, as Optuna stores them, and the first heartbeat."""
        self.params = {key: value for key, value in params.items() if key not in self.seen.params}
        self.beats = True

    def annotate(self, key: str, value: object) -> None:
        """Set a user attribute of a trial that may have ended: Optuna's own way refuses those."""
        self.attributes[key] = value

    def keep(self, key: str, value: object) -> None:
        """Set a system attribute of a trial that has not ended; optuna-dashboard does not show it."""
        self._check_unfinished()
        self.kept[key] = value

    def write(
        self, attributes: Mapping[str, object], state: TrialState | None = None, value: float | None = None
    ) -> None:
        """Set user attributes and, if given, the state. A PRUNED trial gets the value of its last rung."""
        self._check_unfinished()
        self.attributes |= attributes
        if state == TrialState.PRUNED and self.seen.last_step is not None:
            value = self.seen.intermediate_values[self.seen.last_step]
        self.state, self.value = state, value

    def _check_unfinished(self) -> None:
        if self.seen.state.is_finished():
            raise UpdateFinishedTrialError(f"Trial {self.seen.number} has ended.")


def _write(connection: Connection, trials: Sequence[LockedTrial]) -> None:
    """Write the pending changes of the trials."""
    params = [
        {"trial_id": t.id, "param_name": name, "param_value": v, "distribution_json": distribution_to_json(d)}
        for t in trials
        for name, (v, d) in t.params.items()
    ]
    rungs = [{"trial_id": t.id, "step": rung, **_rung(v)} for t in trials for rung, v in t.rungs.items()]
    _replace(connection, ATTRIBUTES, [(t.id, t.attributes, t.seen.user_attrs) for t in trials])
    _replace(connection, KEPT, [(t.id, t.kept, t.seen.system_attrs) for t in trials])
    for table, rows in ((PARAMS, params), (RUNGS, rungs)):
        if rows:
            connection.execute(insert(table), rows)
    for trial in trials:
        _end(connection, trial)
    if beating := [t.id for t in trials if t.beats]:
        _beat(connection, beating)


def _replace(
    connection: Connection,
    table: Table,
    trials: Sequence[tuple[int, Mapping[str, object], Mapping[str, object]]],
) -> None:
    """Write attributes as new rows, so that others see them at their next `Changes.read`.

    ``trials``: the id of each, its new attributes and those it has.
    """
    (row_id,) = table.primary_key.columns
    old: dict[frozenset[str], list[int]] = {}
    for trial_id, attributes, seen in trials:
        if keys := frozenset(attributes.keys() & seen.keys()):
            old.setdefault(keys, []).append(trial_id)
    new: list[dict[str, object]] = [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for trial_id, attributes, _ in trials
        for key, value in attributes.items()
    ]
    if old and connection.dialect.name == "sqlite":  # it would give the highest id again once its row is gone
        top = connection.execute(select(func.max(row_id))).scalar_one()
        new = [{row_id.name: top + place, **one} for place, one in enumerate(new, 1)]
    for keys, ids in old.items():
        mine = table.c.trial_id.in_(ids), table.c.key.in_(sorted(keys))
        connection.execute(delete(table).where(*mine))
    if new:
        connection.execute(insert(table), new)


def _end(connection: Connection, trial: LockedTrial) -> None:
    """Write value and state."""
    if trial.value is not None and trial.value == trial.value:  # not NaN
        number, kind = TrialValueModel.value_to_stored_repr(trial.value)
        if trial.seen.values is not None:
            connection.execute(delete(VALUES).where(VALUES.c.trial_id == trial.id))
        row = {"trial_id": trial.id, "objective": 0, "value": number, "value_type": kind}
        connection.execute(insert(VALUES), row)
    if trial.state is not None:
        is_over = {"datetime_complete": datetime.now(UTC).replace(tzinfo=None)}
        news = {"state": trial.state, **(is_over if trial.state.is_finished() else {})}
        connection.execute(update(TRIALS).where(TRIALS.c.trial_id == trial.id).values(news))


def _rung(perplexity: float) -> dict[str, Any]:
    number, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(perplexity)
    return {"intermediate_value": number, "intermediate_value_type": kind}


def _beat(connection: Connection, trial_ids: Sequence[int]) -> None:
    mine = BEATS.c.trial_id.in_(trial_ids)
    if connection.execute(update(BEATS).where(mine).values(heartbeat=func.now())).rowcount < len(trial_ids):
        known = connection.execute(select(BEATS.c.trial_id).where(mine)).scalars().all()
        if new := [{"trial_id": one} for one in trial_ids if one not in known]:
            connection.execute(insert(BEATS), new)
