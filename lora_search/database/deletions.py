"""Detects deletions under a running sweep: of the SQLite file, the study, or trials. SQLite keeps writing to
a deleted file, and everything is lost when the sweep ends."""

import math
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from optuna.storages._rdb.models import TrialModel
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from lora_search.database.storage import KEY, RESTORE, file_of
from lora_search.database.trial_table import TrialTable
from lora_search.errors import StudyError

MANY, COUNT_SECONDS = 10_000, 60.0


class Losses:
    """Compares the database file with the one that was opened, and the trials with those seen since."""

    def __init__(self, table: TrialTable) -> None:
        self._engine, self._table = table.storage.engine, table
        url = self._engine.url
        self._path = None if "uri" in url.query else file_of(url)
        self._inode = _inode(self._path) if self._path else None
        self._counted_at = -math.inf

    def check_file(self) -> None:
        """Raise StudyError if the file was deleted or replaced, after saving a copy of its content."""
        if self._path is None or (inode := _inode(self._path)) == self._inode:
            return
        happened = "was deleted" if inode is None else "was replaced by another file"
        raise StudyError(f"{KEY}: {self._path} {happened} while the sweep ran. {self._rescue(self._path)}")

    def check_trials(self, num_seen: int) -> None:
        """Raise StudyError if any of the study's first ``num_seen`` trials is missing. Of more than MANY they
        are counted once a minute: a server takes 40 ms for 100,000."""
        self.check_file()
        is_due = num_seen <= MANY or time.monotonic() - self._counted_at > COUNT_SECONDS
        if not num_seen or not is_due:
            return
        self._counted_at = time.monotonic()
        last = self._table.id_of(num_seen - 1)
        with Session(self._engine) as session:
            trials = session.query(TrialModel).filter_by(study_id=self._table.study_id)
            missing = num_seen - trials.filter(TrialModel.trial_id <= last).count()
        if missing:
            text = f"{missing} of {num_seen} trials were deleted in the database while the sweep ran"
            raise StudyError(f"{KEY}: {text}. {RESTORE}")

    def _rescue(self, path: Path) -> str:
        """Copy the content of the lost file next to it; return the remedy. Workers that share the file write
        the same copy; the last one is the newest."""
        copy = path.with_name(f"{path.name}.rescued-{self._inode}")
        fresh = copy.with_name(f"{copy.name}.{os.getpid()}.new")
        try:
            with self._engine.connect() as connection, closing(sqlite3.connect(fresh)) as target:
                source = connection.connection.driver_connection
                assert isinstance(source, sqlite3.Connection)
                source.backup(target)
            os.replace(fresh, copy)
        except (SQLAlchemyError, sqlite3.Error, OSError):
            fresh.unlink(missing_ok=True)
            return RESTORE
        return (
            f"Its content is saved in {copy}. To continue: stop all workers, delete {path}-wal and "
            f"{path}-shm if they exist, move the copy to {path}, and run the same command again."
        )


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
