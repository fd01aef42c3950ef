"""Attributes of a study that many workers use: those it gets once, of several simultaneous starts from the
first; a worker's own; and work that one worker does at a time."""

import json
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from optuna.storages import RDBStorage
from optuna.storages._rdb.models import StudySystemAttributeModel, StudyUserAttributeModel
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Query, Session

from lora_search.database.presence import worker_runs


def write_once(storage: RDBStorage, study_id: int, values: Mapping[str, object]) -> dict[str, Any]:
    """Store the attributes that the study lacks, in one transaction; return all of its attributes.

    The table has one row per study and key, so the second of two writers gets an IntegrityError.
    """
    attributes: dict[str, Any] = storage.get_study_user_attrs(study_id)
    lacking = {key: value for key, value in values.items() if key not in attributes}
    if not lacking:
        return attributes
    with suppress(IntegrityError), Session(storage.engine) as session, session.begin():
        for key, value in lacking.items():
            session.add(StudyUserAttributeModel(study_id=study_id, key=key, value_json=json.dumps(value)))
    return storage.get_study_user_attrs(study_id)


def read_attribute(storage: RDBStorage, study_id: int, key: str) -> Any:
    """Return one attribute of a study, as it is now; None if there is none."""
    row = StudyUserAttributeModel
    with Session(storage.engine) as session:
        text = session.query(row.value_json).filter_by(study_id=study_id, key=key).scalar()
    return None if text is None else json.loads(text)


def write_own(storage: RDBStorage, study_id: int, key: str, value: object) -> None:
    """Set a system attribute that no other worker writes, in one statement where Optuna takes three."""
    row = {"study_id": study_id, "key": key}
    with Session(storage.engine) as session, session.begin():
        found = session.query(StudySystemAttributeModel).filter_by(**row)
        if not found.update({"value_json": json.dumps(value)}, synchronize_session=False):
            session.add(StudySystemAttributeModel(**row, value_json=json.dumps(value)))


def write_latest(storage: RDBStorage, study_id: int, key: str, value: object) -> None:
    """Set a system attribute that several workers write; of two that are the first at once, one does."""
    with suppress(IntegrityError):
        write_own(storage, study_id, key, value)


def read_latest(storage: RDBStorage, study_id: int, key: str) -> Any:
    """Return one system attribute of a study; None if there is none."""
    row = StudySystemAttributeModel
    with Session(storage.engine) as session:
        text = session.query(row.value_json).filter_by(study_id=study_id, key=key).scalar()
    return None if text is None else json.loads(text)


class Turn:
    """Work on a study that any worker may do, on whichever machine, but only one at a time.

    The study's row of the work names who has the turn; every change of it is one statement that names what
    it replaces. Whoever extends it no more loses it after ``grace_seconds``, by the others' own clocks; where
    both are on one host, at once if its process has ended, and never while it runs.
    """

    def __init__(
        self, storage: RDBStorage, study_id: int, work: str, worker: str, grace_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._storage = storage
        self._row: dict[str, Any] = {"study_id": study_id, "key": f"turn/{work}"}
        self._worker, self._grace_seconds, self._clock = worker, grace_seconds, clock
        self._own: list[str] = []  # what the row may be in this worker's turn: a write or its answer may fail
        self._seen: tuple[str | None, float] = (None, 0.0)  # another's, and since when

    def take(self) -> bool:
        """Return whether it is this worker's turn by now. Raises KeyError if the study was deleted."""
        found = self._read()
        if found is not None and found in self._own:
            return True
        if found is None:
            self._storage.get_study_name_from_id(self._row["study_id"])
        if found != self._seen[0]:
            self._seen = found, self._clock()
        if found is not None and not self._is_over(found):
            return False
        after = self._next()
        with suppress(IntegrityError), Session(self._storage.engine) as session, session.begin():
            if found is None:
                session.add(StudySystemAttributeModel(**self._row, value_json=after))
            else:
                self._found(session, [found]).update({"value_json": after}, synchronize_session=False)
        return self._read() in self._own

    def extend(self) -> None:
        """Show that this worker is still at it; without effect where another has taken the turn."""
        before, after = list(self._own), self._next()
        with Session(self._storage.engine) as session, session.begin():
            self._found(session, before).update({"value_json": after}, synchronize_session=False)
        self._own = [after]

    def give_back(self) -> None:
        """End this worker's turn, if it still has it."""
        with Session(self._storage.engine) as session, session.begin():
            self._found(session, self._own).delete(synchronize_session=False)

    def _is_over(self, found: str) -> bool:
        worker = str(json.loads(found)[0])
        runs = worker_runs(worker)
        return self._clock() - self._seen[1] > self._grace_seconds if runs is None else not runs

    def _next(self) -> str:
        """Return what is to be written now."""
        self._own.append(json.dumps([self._worker, uuid.uuid4().hex]))
        return self._own[-1]

    def _read(self) -> str | None:
        with Session(self._storage.engine) as session:
            found = session.query(StudySystemAttributeModel.value_json).filter_by(**self._row).scalar()
        return None if found is None else str(found)

    def _found(self, session: Session, values: list[str]) -> Query[StudySystemAttributeModel]:
        row = StudySystemAttributeModel
        return session.query(row).filter_by(**self._row).filter(row.value_json.in_(values))
