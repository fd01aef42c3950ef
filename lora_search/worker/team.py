"""Worker processes of this host: started, restarted if a signal killed them, told to stop.

Each is the command of the sweep with `launcher.worker=N`; it gets its settings on standard input, which stays
open as long as its parent lives.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lora_search.database.sqlite_file import MOST_WORKERS, TO_A_SERVER
from lora_search.errors import InputError, LoraSearchError
from lora_search.settings.schema import SweepConfig, require
from lora_search.settings.secrets import redact
from lora_search.worker.command import LETTER_VARIABLE, received

ENDED = {0: "done", 1: "failed", 2: "wrong input", 130: "interrupted"}


def check_workers(config: SweepConfig, count: int) -> None:
    """Raise ConfigError where the workers cannot share one device, or SQLite cannot hold so many."""
    device, launcher = config.engine.device, config.launcher.name
    rule = f"must be auto, cpu or cuda with launcher={launcher}, which gives each worker its GPU"
    remedy = "Choose GPUs with CUDA_VISIBLE_DEVICES"
    require(device in ("auto", "cpu", "cuda"), "engine.device", device, rule, remedy)
    fits = count <= MOST_WORKERS or not config.study.storage.startswith("sqlite")
    rule = f"must be at most {MOST_WORKERS} with SQLite, which lets one worker write at a time"
    require(fits, "launcher.workers", count, rule, TO_A_SERVER)


@dataclass
class Worker:
    """One worker process, restarted up to ``restarts_left`` times."""

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    restarts_left: int
    letter: bytes = b""
    folder: Path | None = None  # where it runs; None: here
    has_ended: bool = False  # for good
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self, mode: str = "wb") -> None:
        """Start in a new session, so that Ctrl-C in the terminal reaches only the parent."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        error_file(self.log).unlink(missing_ok=True)
        with self.log.open(mode) as log:
            self.process = subprocess.Popen(
                self.command,
                env={**self.environment, LETTER_VARIABLE: "1"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `check` says how it ended
            self.process.stdin.write(self.letter)
            self.process.stdin.flush()

    def check(self) -> str:
        """Restart it if a signal killed it; return what happened since the last call, in words.

        Raises InputError if it found wrong input, since all others would too.
        """
        code = self.process.poll()
        if code is None or self.has_ended:
            return ""
        if code < 0 and self.restarts_left:
            self._restart()
            return f"was {outcome(code)}; restarted ({self.restarts_left} more times)"
        self.has_ended = True
        if code == InputError.exit_code:
            raise InputError(self.message())
        return f"{outcome(code)}: {self.message()}" if code else ""

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Tell it to put its trials back and end, if it runs."""
        if self.process.poll() is None:
            self.process.send_signal(number)  # nohup and a shell's & make processes ignore SIGINT

    def close(self) -> None:
        """Wait until it has ended."""
        self.process.wait()
        self._close_input()

    def message(self) -> str:
        """Return the error that ended it, or the log to read."""
        error = error_file(self.log)
        return error.read_text(encoding="utf-8") if error.exists() else f"see {self.log}"

    def _restart(self) -> None:
        self._close_input()
        self.restarts_left -= 1
        self.start("ab")

    def _close_input(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()


def outcome(code: int) -> str:
    """Return how a process ended, in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else ENDED.get(code, f"left with {code}")


class Team:
    """All workers of this host's launcher. On exit from the context all of them have ended."""

    shows_logs = False  # whether `look` returns what the workers say

    def __init__(self, workers: Sequence[Worker], places: str = "") -> None:
        self.workers, self.places = workers, places

    def __enter__(self) -> "Team":
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Tell running workers to put their trials back, and wait. A second interrupt ends this process and
        closes their standard input, so they end too."""
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.close()

    def look(self) -> list[str]:
        """Restart workers that a signal killed; return what happened since the last call.

        Raises InputError if a worker found wrong input.
        """
        news = [(number, worker.check()) for number, worker in enumerate(self.workers)]
        return [f"worker {number} {text}" for number, text in news if text]

    @property
    def is_at_work(self) -> bool:
        """Whether some worker runs, or has ended since the last `look`."""
        return not all(worker.has_ended for worker in self.workers)

    def check_someone_finished(self) -> None:
        """Raise LoraSearchError if no worker reached the end of the study."""
        codes = [worker.process.returncode for worker in self.workers]
        if all(codes):
            raise ended_early(0, codes[0], self.workers[0].message())


def ended_early(number: int, code: int, message: str) -> LoraSearchError:
    """Return the error of a launcher that has no worker left."""
    return LoraSearchError(f"launcher: every worker ended early; worker {number} {outcome(code)}: {message}")


@contextmanager
def told_to_launcher(is_worker: bool) -> Iterator[None]:
    """In a worker: write the error that ends it to a file for the parent, and end when the parent ends."""
    if not is_worker:
        yield
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        yield
    except LoraSearchError as error:
        path = received().error_file
        if path is not None:
            Path(path).write_text(redact(str(error)), encoding="utf-8")
        raise


def error_file(log: Path) -> Path:
    """Return the file for the error that ended a worker."""
    return log.with_suffix(".error")


def _end_with_parent() -> None:
    """Wait for the end of standard input, which the parent keeps open; then interrupt this process, since
    nothing supervises it any more and the next start of the sweep needs its GPU."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
