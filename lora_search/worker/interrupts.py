"""Ctrl-C, SIGTERM and SIGHUP. While trials train, the pass that runs is finished first; the second signal,
or one at any other moment, ends the process at once. No library in between sees an exception, so none prints
one."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lora_search.output.streams import open_missing_streams

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_CODE = 130
GOOD_BYE = b"\ninterrupted: nothing is lost, the same command goes on\n"
PASS_ENDS = b"\ninterrupted: the pass that runs is finished first; once more leaves at once\n"


class Interrupts:
    """Answers the signals from `listen` on, also while the interpreter shuts down."""

    def __init__(self) -> None:
        self.has_come = False
        self._is_patient = False

    def listen(self) -> "Interrupts":
        """Answer the signals from now on, save those that nohup or a shell's & told it to ignore."""
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
        """End the process. After an interrupt at once: what was open is closed, and an interpreter that shuts
        down answers the next signal in its own way."""
        if code == EXIT_CODE:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    def _answer(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_patient and not self.has_come:
            self.has_come = True
            _say(PASS_ENDS)
            return
        _say(GOOD_BYE)
        os._exit(EXIT_CODE)


def _say(text: bytes) -> None:
    with suppress(OSError):  # the terminal may be gone: that is what SIGHUP says
        os.write(1, text)
