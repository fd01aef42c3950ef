"""A seat: one worker process on a node of a cluster, with what it says.

Ray or Slurm starts it there, in the same installation of this package as here; settings, sweep files and
variables come with the order.
"""

import os
import re
import shutil
import signal
import socket
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_search import __version__
from lora_search.errors import InputError, LoraSearchError
from lora_search.worker.command import Command
from lora_search.worker.team import Worker, ended_early, error_file

# Keys of services that any node needs. A node's own value counts first.
SERVICES = re.compile(r"(AWS_|GOOGLE_|AZURE_|HF_|WANDB_|PG)[A-Z0-9_]+$")
PATTERNS = ("*.yaml", "*/*.yaml", "*/*/*.yaml")  # sweeps, groups, groups within a group as space/lora
MOST_BYTES = 100_000  # Slurm's jobs have them in a variable, of at most 128 KiB
NAMED = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a seat needs to start its worker on any node."""

    command: Command
    folder: str  # the one that the user is in; made on a node that lacks it
    files: Mapping[str, str]  # of the user's own folder of sweeps: path in it -> text
    environment: Mapping[str, str]  # where a node lacks the variable
    max_restarts: int
    version: str = __version__


@dataclass(frozen=True, kw_only=True)
class Report:
    """What happened on a seat since the last one."""

    place: str  # the node
    start: str  # changes when the seat is restarted
    lines: list[str] = field(default_factory=list)  # of the worker's log
    news: str = ""
    code: int | None = None  # the worker's, once it has ended for good
    message: str = ""  # with a code other than 0
    version: str = __version__


def make_order(command: Command, max_restarts: int, environment: Mapping[str, str]) -> Order:
    """Return the order for every seat, with the sweep files and variables that the settings name. Raises
    InputError if the user's folder of sweeps is something larger."""
    files = {} if command.config_dir is None else sweep_files(Path(command.config_dir))
    named = {name for text in (*command.overrides, *files.values()) for name in NAMED.findall(text)}
    passed = {name: value for name, value in environment.items() if SERVICES.match(name) or name in named}
    return Order(
        command=command, folder=os.getcwd(), files=files, environment=passed, max_restarts=max_restarts
    )


def sweep_files(folder: Path) -> dict[str, str]:
    """Return the sweeps and groups in a folder: path in it -> text. Raises InputError."""
    paths = sorted(path for pattern in PATTERNS for path in folder.glob(pattern))
    num_bytes = sum(path.stat().st_size for path in paths)
    if num_bytes > MOST_BYTES:
        text = (
            f"-cd {folder}: has {len(paths)} YAML files of {num_bytes / 1e6:.1f} MB, which workers elsewhere"
        )
        raise InputError(
            f"{text} would get; at most {MOST_BYTES / 1e6} MB. Give the sweeps a folder of their own."
        )
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in paths}


class Seat:
    """The state of one seat. Everything in it stays on the node."""

    def __init__(self, order: Order, number: int, log: Path | None = None) -> None:
        """Start the worker. Its log is a file of its own on this node unless a place is given."""
        self._start, self._message = uuid.uuid4().hex, ""
        self._code: int | None = None
        self._own = Path(tempfile.mkdtemp(prefix="lora_search-"))  # for the user alone
        log, folder = log or self._own / f"{number}.log", Path(order.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in order.files.items():
            path = self._own / "sweeps" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        line = order.command.for_worker(number, self._own / "sweeps" if order.files else None)
        letter = order.command.letter(error_file(log), order.environment)
        self.worker = Worker(line, os.environ, log, order.max_restarts, letter, folder)
        self.worker.start("ab")
        self._tail = Tail(log)

    def look(self) -> Report:
        """Restart the worker if a signal killed it; return what happened since the last call."""
        news = ""
        try:
            news = self.worker.check()
        except InputError as error:
            news = str(error)
        if self.worker.has_ended and self._code is None:
            self._code = self.worker.process.returncode
            self._message = self.worker.message() if self._code else ""
        return Report(
            place=socket.gethostname(),
            start=self._start,
            lines=self._tail.read(),
            news=news,
            code=self._code,
            message=self._message,
        )

    def stop(self) -> Report:
        """Have the worker put its trials back and end; return the last report."""
        self.worker.stop(signal.SIGUSR1)  # SIGTERM may have come from elsewhere, and twice means at once
        self.worker.close()
        self.worker.has_ended = True
        report = self.look()
        shutil.rmtree(self._own, ignore_errors=True)
        return report


class Tail:
    """Reads the new lines of a log that grows."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0

    def read(self) -> list[str]:
        """Return the whole lines since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line.decode(errors="replace") for line in whole.splitlines() if line.strip()]


class Reports:
    """What the seats of all nodes have said so far: their logs, and how their workers ended."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self.ended: dict[int, tuple[int, str]] = {}  # number of the worker -> exit code, message
        self._places: dict[int, tuple[str, str]] = {}

    def take(self, number: int, report: Report) -> list[str]:
        """Keep a report; return it as lines for the screen. Raises InputError for wrong input."""
        said = [f"worker {number} | {line}" for line in report.lines]
        if report.code is None and self._places.get(number) != (report.place, report.start):
            again = "again, " if number in self._places else ""
            said.insert(0, f"worker {number} runs {again}on {report.place}")
            self._places[number] = report.place, report.start
        self._write(number, report.lines)
        if report.version != __version__:
            there = f"lora_search {report.version} on {report.place}, {__version__} here"
            raise InputError(f"launcher: {there}. Install the same version on every node.")
        if report.code == InputError.exit_code:
            raise InputError(report.message)
        if report.news:
            said.append(f"worker {number} {report.news}")
        if report.code is not None:
            self.ended[number] = report.code, report.message
        return said

    @property
    def is_finished(self) -> bool:
        """Whether a worker has reached the end of the study: the others end soon."""
        return any(code == 0 for code, _ in self.ended.values())

    def check_someone_finished(self) -> None:
        """Raise LoraSearchError if no worker reached the end of the study."""
        if self.is_finished:
            return
        if not self.ended:
            raise LoraSearchError("launcher: no worker has reached the end of the study")
        number, (code, message) = min(self.ended.items())
        raise ended_early(number, code, message)

    def _write(self, number: int, lines: list[str]) -> None:
        if lines:
            self._logs.mkdir(parents=True, exist_ok=True)
            with (self._logs / f"{number}.log").open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
