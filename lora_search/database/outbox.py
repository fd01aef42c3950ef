"""The worker's access to a database that may be unreachable for a while.

Writes wait in order until they succeed; queries return None in the meantime. The delay between two tries
doubles: 1, 2, 4 ... 60 seconds. An outage longer than study.patience_seconds is a StudyError.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from lora_search.database.storage import explained_errors
from lora_search.errors import DatabaseError, StudyError
from lora_search.settings.schema import StudyConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_DELAY_SECONDS = 60.0


class Outbox:
    """Every write must be repeatable: it may have reached the database before the connection broke. Writes
    wait as callables, since what they write depends on who holds the trial by then."""

    def __init__(self, config: StudyConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._waiting: deque[Callable[[], object]] = deque()
        self._gone_since: float | None = None
        self._next_try, self._delay = 0.0, 1.0

    @property
    def is_open(self) -> bool:
        """Whether the last query was answered and no write waits."""
        return self._gone_since is None and not self._waiting

    @property
    def seconds_to_next_try(self) -> float:
        return max(0.0, self._next_try - self._clock()) if self._gone_since is not None else 0.0

    def put(self, write: Callable[[], object]) -> None:
        """Queue a write."""
        self._waiting.append(write)

    def flush(self) -> bool:
        """Run the queued writes in order; return whether all succeeded."""
        while self._waiting and self.ask(self._write_first) is not None:
            pass
        return self.is_open

    def ask(self, question: Callable[[], T]) -> T | None:
        """Return the answer; None while the database is unreachable. Raises StudyError once that lasts too
        long. ``question`` is a callable since it is called only when the next try is due."""
        if self.seconds_to_next_try:
            return None
        try:
            with explained_errors(self._config):
                answer = question()
        except DatabaseError as error:
            self._note_failure(error)
            return None
        if self._gone_since is not None:
            logger.warning("study.storage answers again; %d writes are queued", len(self._waiting))
        self._gone_since, self._delay = None, 1.0
        return answer

    def insist(self, question: Callable[[], T]) -> T:
        """Return the answer, waiting up to study.patience_seconds for the database."""
        while (answer := self.ask(question)) is None:
            time.sleep(self.seconds_to_next_try)
        return answer

    def _write_first(self) -> bool:
        self._waiting[0]()
        self._waiting.popleft()
        return True

    def _note_failure(self, error: DatabaseError) -> None:
        now = self._clock()
        self._gone_since = now if self._gone_since is None else self._gone_since
        gone = now - self._gone_since
        if gone >= self._config.patience_seconds or "disk is full" in str(error):
            raise StudyError(
                f"{error}. This has lasted {gone:.0f} s (study.patience_seconds: "
                f"{self._config.patience_seconds}). Checkpoints are kept: once the database is back, run the "
                "same command again."
            )
        logger.warning("%s. Training continues; %d writes are queued; next try in %.0f s", error,
                       len(self._waiting), self._delay)  # fmt: skip
        self._next_try = now + self._delay
        self._delay = min(2 * self._delay, MAX_DELAY_SECONDS)
