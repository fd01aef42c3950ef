"""What has changed in a study since the last `read`, from Optuna's own tables, whoever wrote it: another
worker of any version, the dashboard, Optuna's command line.

`read` takes the states of unfinished trials, the new rows of reports and attributes, and in full only the
trials that these belong to. Our own writers replace the row of an attribute, so that it is new. What another
program changes in place is found when all unfinished trials are read again: once a minute, less often when
thousands run.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    NOT_FOUND_MSG,
    TrialIntermediateValueModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
)
from optuna.trial import FrozenTrial
from sqlalchemy import func, literal_column, or_, select, union_all
from sqlalchemy.engine import Connection

from lora_search.database.trial_reader import HEADS, TRIALS, UNFINISHED, Head, in_chunks, table_of

# Ids are given before a transaction is committed, so a lower one may appear later. A writer that is silent
# for longer loses its connection (database.drivers).
LATE_SECONDS = 10.0
REFRESH_SECONDS = 60.0
REFRESH_PER_TRIAL = 0.05  # seconds more for each unfinished trial: 4,000 are read again every 4 minutes
NOTHING_YET = 2**31 - 1  # the largest row id that Optuna's columns hold
NO_TRIAL: Any = literal_column("0")
Place = tuple[int, int]  # which of the tables, and the row's id


class Changes:
    """Follows one study. A finished trial is yielded once."""

    def __init__(
        self, storage: RDBStorage, study_id: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._clock = storage.engine.execution_options(only_reads=True), clock
        self._study_id = study_id
        self._known: dict[int, tuple[object, object]] = {}  # unfinished trial's id -> its state and start
        self._last_id = 0
        self._marks: list[tuple[float, list[int]]] = []  # when, and the highest row ids by then
        self._seen: set[Place] = set()  # rows above the first mark
        self._refresh_at = self._clock() + LATE_SECONDS  # for what was being written at the first read

    def read(self, also: Iterable[int] = ()) -> Iterator[FrozenTrial]:
        """Yield the trials that are new or have changed, by number, and the unfinished ones with the ids
        ``also``.

        Raises KeyError, as Optuna does, if unfinished trials were deleted.
        """
        with self._engine.connect() as connection:
            now, (top, touched) = self._clock(), self._touched(connection)
            heads = {head[0]: head for head in connection.execute(self._heads()).all()}
            changed = {one for one, head in heads.items() if self._known.get(one) != _status(head)}
            changed |= {one for one in (*touched.values(), *also) if one in heads}
            changed |= self._known.keys() - heads.keys()  # they have ended
            if now >= self._refresh_at:
                changed |= heads.keys()
                self._refresh_at = now + REFRESH_SECONDS + REFRESH_PER_TRIAL * len(heads)
            num_found = 0
            for trials in in_chunks(connection, changed, known=heads):
                num_found += len(trials)
                for trial in trials:
                    self._note(trial, heads)
                    yield trial
        if num_found < len(changed):
            raise KeyError(NOT_FOUND_MSG)
        self._seen |= touched.keys()
        self._mark(now, top)

    def _note(self, trial: FrozenTrial, heads: Mapping[int, Head]) -> None:
        trial_id = trial._trial_id
        self._last_id = max(self._last_id, trial_id)
        if trial.state.is_finished():
            self._known.pop(trial_id, None)
        elif trial_id in heads:
            self._known[trial_id] = _status(heads[trial_id])

    def _heads(self) -> Any:
        """Select the unfinished trials, and all that are newer than the newest one seen."""
        trial = TRIALS.c
        unseen = or_(trial.state.in_(UNFINISHED), trial.trial_id > self._last_id)
        return HEADS.where(trial.study_id == self._study_id, unseen)

    def _touched(self, connection: Connection) -> tuple[list[int], dict[Place, int]]:
        """Return the highest row ids, and the unseen rows of reports and attributes with their trials."""
        floor = self._marks[0][1] if self._marks else [NOTHING_YET] * len(_TABLES)
        selects = []
        for place, (model, key) in enumerate(_TABLES):
            table = table_of(model)
            here: Any = literal_column(str(place))
            selects.append(select(here, func.coalesce(func.max(table.c[key]), 0), NO_TRIAL))
            rows_here = select(here, table.c[key], table.c.trial_id).join(TRIALS)
            is_new = table.c[key] > floor[place]
            selects.append(rows_here.where(is_new, TRIALS.c.study_id == self._study_id))
        rows = connection.execute(union_all(*selects)).all()
        top = {place: row for place, row, trial in rows if not trial}
        new = {(place, row): trial for place, row, trial in rows if trial}
        return [top[place] for place in range(len(_TABLES))], {
            row: trial for row, trial in new.items() if row not in self._seen
        }

    def _mark(self, now: float, top: list[int]) -> None:
        """Move the floor: rows below it have been seen, and none may still appear there."""
        self._marks.append((now, top))
        while len(self._marks) > 1 and self._marks[1][0] <= now - LATE_SECONDS:
            del self._marks[0]
        floor = self._marks[0][1]
        self._seen = {row for row in self._seen if row[1] > floor[row[0]]}


def _status(head: Head) -> tuple[object, object]:
    return head[2], head[3]  # by name it takes ten times as long


_TABLES = (
    (TrialIntermediateValueModel, "trial_intermediate_value_id"),
    (TrialUserAttributeModel, "trial_user_attribute_id"),
    (TrialSystemAttributeModel, "trial_system_attribute_id"),
)
