"""The worker's line to the database, which may be gone for a while.

What must be written waits in order until it is written; what is only asked gets no answer meanwhile.
After each failure the next try comes later: 1, 2, 4 ... 60 seconds. One that lasts longer than
study.patience_seconds is a StudyError.
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
    """Every write is one that may be repeated: it can have reached the database before the line broke. Writes
    wait as callables, for what is written depends on whose trial it is by then."""

    def __init__(self, config: StudyConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._waiting: deque[Callable[[], object]] = deque()
        self._gone_since: float | None = None
        self._next_try, self._delay = 0.0, 1.0

    @property
    def is_open(self) -> bool:
        """Whether the database answered last time and nothing waits."""
        return self._gone_since is None and not self._waiting

    @property
    def seconds_to_next_try(self) -> float:
        return max(0.0, self._next_try - self._clock()) if self._gone_since is not None else 0.0

    def put(self, write: Callable[[], object]) -> None:
        """Let this be written after all that waits."""
        self._waiting.append(write)

    def flush(self) -> bool:
        """Write what waits, in order; return whether nothing waits any more."""
        while self._waiting and self.ask(self._write_first) is not None:
            pass
        return self.is_open

    def ask(self, question: Callable[[], T]) -> T | None:
        """Return what the study answers; None while the database is gone. Raises StudyError in the end."""
        if self.seconds_to_next_try:
            return None
        try:
            with explained_errors(self._config):
                answer = question()
        except DatabaseError as error:
            self._note_failure(error)
            return None
        if self._gone_since is not None:
            logger.warning("study.storage answers again; %d writes waited", len(self._waiting))
        self._gone_since, self._delay = None, 1.0
        return answer

    def insist(self, question: Callable[[], T]) -> T:
        """Return what the study answers, however long that takes within study.patience_seconds."""
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
                f"{error}. It has been so for {gone:.0f} s (study.patience_seconds: "
                f"{self._config.patience_seconds}). Checkpoints are kept: once the database is back, "
                "the same command goes on."
            )
        logger.warning("%s. Training goes on; %d writes wait; next try in %.0f s", error,
                       len(self._waiting), self._delay)  # fmt: skip
        self._next_try = now + self._delay
        self._delay = min(2 * self._delay, MAX_DELAY_SECONDS)
