"""Standard output and error as a command uses them: no password and no control sequence of others' making
passes, and their loss (a full disk, a closed pipe, a terminal that is gone) never ends a sweep.
"""

import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from lora_search.settings.secrets import redact

MAX_LINES, MAX_CHARACTERS = 24, 2400  # of one message: a screen
CONTROL = (
    re.compile(  # C0 without tab and line feed, DEL, C1; line separators; what turns the writing direction
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    )
)
NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF)  # head has seen enough, the terminal is closed: no fault


def greet(command: str) -> None:
    """Show in a terminal that a command has begun: its libraries take a second or more to load."""
    to_terminal(f"lora-search {command} ...")


def to_terminal(text: str) -> None:
    """Write to standard error where that is a terminal."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(text)
            sys.stderr.flush()


def clean(text: str) -> str:
    """Return the text with control characters shown as escapes: \\x1b."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def shorten(text: str) -> str:
    """Return a message that fits on a screen; a count replaces its middle."""
    lines = text.splitlines()
    if len(lines) > MAX_LINES:
        left_out = len(lines) - MAX_LINES
        text = "\n".join([*lines[: MAX_LINES - 6], f"  ... {left_out:,} more lines ...", *lines[-6:]])
    if len(text) > MAX_CHARACTERS:
        head, tail = text[: MAX_CHARACTERS - 800], text[-800:]
        text = f"{head} ... {len(text) - MAX_CHARACTERS:,} more characters ... {tail}"
    return text


class Outlet(io.TextIOBase):
    """A text stream that hides secrets and survives the loss of what it writes to."""

    def __init__(self, inner: TextIO, *, is_plain: bool = False) -> None:
        self._inner, self._is_plain = inner, is_plain
        self.loss: OSError | None = None
        if isinstance(inner, io.TextIOWrapper):
            inner.reconfigure(errors="backslashreplace")  # of a terminal that has no such letter

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._inner.encoding or "utf-8"

    def isatty(self) -> bool:
        return self._inner.isatty()

    def fileno(self) -> int:
        return self._inner.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        shown = redact(text)
        try:
            self._inner.write(clean(shown) if self._is_plain else shown)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._inner.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Discard everything written from now on."""
        self.loss = self.loss or error
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._inner.fileno())
            os.close(nowhere)


@contextmanager
def guarded_streams() -> Iterator[Outlet]:
    """Let everything that this process prints pass an Outlet; give standard output's.

    An exception that nobody expected is a bug: its traceback goes to standard error, secrets left out.
    """
    open_missing_streams()
    to_terminal("\r\x1b[K")  # instead of the greeting
    before = sys.stdout, sys.stderr
    out, err = Outlet(sys.stdout), Outlet(sys.stderr, is_plain=True)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    except Exception:  # noqa: BLE001 (whatever it is, the interpreter would print it with its secrets)
        traceback.print_exc(file=err)
        raise SystemExit(1) from None
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def exit_code(code: int, out: Outlet) -> int:
    """Return the exit code of a command whose output is what was asked for: 1 where it could not be written.
    A reader that has seen enough (`| head`) is no fault."""
    out.flush()
    if out.loss is None or out.loss.errno in NOBODY_READS:
        return code
    sys.stderr.write(f"standard output: cannot be written: {out.loss.strerror}\n")
    return code or 1


def open_missing_streams() -> None:
    """Open what the shell closed (`>&-`) to nowhere: the next file of ours, the database perhaps, would get
    its number, and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
