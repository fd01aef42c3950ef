"""runs/<study>/sweep.log: every line of every start, without control sequences and passwords.

What is said before the study's folder is there waits for it. A file that cannot be written ends nothing: the
terminal says the same.
"""

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from lora_search.output.streams import clean
from lora_search.settings.secrets import redact

NAME = "sweep.log"


class LogFile:
    """Appends lines. The file is opened for each: they are few, and the folder may be moved meanwhile."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._waiting: list[str] = []

    def open(self, folder: Path) -> None:
        """Write to this study's folder from now on, beginning with what was said so far."""
        if self._path is None:
            began = datetime.now(UTC).isoformat(timespec="seconds")
            self._path, waiting = folder / NAME, "\n".join(self._waiting)
            self._waiting.clear()
            self.write(f"--- {began}\n{waiting}" if waiting else f"--- {began}")

    def write(self, text: str) -> None:
        """Append a text of one or several lines."""
        lines = [clean(redact(line)).rstrip() for line in text.splitlines()]
        if self._path is None:
            self._waiting += lines
            return
        with suppress(OSError), self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(f"{line}\n" for line in lines))
