"""Handles Ctrl-C, SIGTERM and SIGHUP. While trials train, the current pass is finished first; a second
signal, or one at any other time, ends the process at once. Clusters announce the end of a job by SIGUSR1 or
SIGUSR2: these never cut a pass short. Libraries see no exception, so they print none."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lora_search.output.streams import open_missing_streams

NOTICES = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *NOTICES)
EXIT_CODE = 130
GOOD_BYE = b"\ninterrupted: nothing is lost; run the same command to continue\n"
PASS_ENDS = b"\ninterrupted: finishing the current pass; interrupt again to exit at once\n"


class Interrupts:
    """Handles the signals after `listen`, also while the interpreter shuts down."""

    def __init__(self) -> None:
        self.has_come = False
        self._is_patient = False

    def listen(self) -> "Interrupts":
        """Handle the signals from now on, except those that nohup or a shell's & has set to be ignored."""
        open_missing_streams()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._answer)
        return self

    @contextmanager
    def after_the_pass(self) -> Iterator[None]:
        """Inside, the first signal only sets ``has_come``."""
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.has_come:
            raise KeyboardInterrupt

    def leave(self, code: int) -> None:
        """End the process. After an interrupt at once: everything is closed by then, and an interpreter that
        shuts down would handle another signal in its own way."""
        if code == EXIT_CODE:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    def _answer(self, number: int, _frame: FrameType | None) -> None:
        if number in NOTICES and self.has_come:
            return
        if self._is_patient and not self.has_come:
            self.has_come = True
            _say(PASS_ENDS)
            return
        _say(GOOD_BYE)
        os._exit(EXIT_CODE)


def _say(text: bytes) -> None:
    with suppress(OSError):  # the terminal may be gone, as after SIGHUP
        os.write(1, text)
