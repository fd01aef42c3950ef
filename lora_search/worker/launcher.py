"""launcher=local: worker processes that share one study, one per visible GPU, with one parent.

A worker is the same command with `launcher.worker=N`; it trains as launcher=inline does and writes to
runs/<study>/workers/N.log. The parent imports no torch and trains nothing: it shows the study, restarts
workers that a signal killed, and forwards an interrupt. A worker gets its settings, which may contain
passwords, in its environment, since all users can read command lines.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.errors import ConfigError, InputError, LoraSearchError
from lora_search.output.terminal import Progress
from lora_search.results.formatting import show_perplexity
from lora_search.settings.schema import StudyConfig, SweepConfig, require
from lora_search.settings.secrets import redact
from lora_search.worker.command import Command

if TYPE_CHECKING:
    from lora_search.study.view import StudyView

LOGS = "workers"  # the folder of their logs, in the study's
SQLITE_WORKERS = 8  # without training between their writes 8 got through, of 32 many failed
LOOK_SECONDS = 1.0  # between two polls of the workers and the study
ENDS = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
ENDED = {0: "done", 1: "failed", 2: "wrong input", 130: "interrupted"}


def visible_gpus() -> int:
    """Return the number of GPUs that torch sees, from a separate process, so that this one stays small."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def plan_workers(config: SweepConfig, num_gpus: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Return each worker's environment: its own GPU, or its share of the cores.

    ``num_gpus`` is 0 with engine.device=cpu. Raises ConfigError if there are more workers than GPUs.
    """
    device, workers = config.engine.device, config.launcher.workers
    require(
        device in ("auto", "cpu", "cuda"),
        "engine.device",
        device,
        "must be auto, cpu or cuda with launcher=local, which gives each worker its own GPU",
        "Choose GPUs with CUDA_VISIBLE_DEVICES",
    )
    require(
        num_gpus == 0 or workers is None or workers <= num_gpus,
        "launcher.workers",
        workers,
        f"must be at most {num_gpus}, the visible GPUs",
        "Lower it, or set engine.device=cpu",
    )
    count = workers or num_gpus or 1
    require(
        count <= SQLITE_WORKERS or not config.study.storage.startswith("sqlite"),
        "launcher.workers",
        count,
        f"must be at most {SQLITE_WORKERS} with SQLite, which lets one worker write at a time",
        "Give study.storage=postgresql+psycopg://user@host/database (pip install 'lora-search[postgres]')",
    )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(num_gpus)]
    threads = str(max(1, num_cores() // count))
    common = {"OMP_NUM_THREADS": threads, **environment}
    if num_gpus == 0:
        return [common] * count
    return [common | {"CUDA_VISIBLE_DEVICES": gpus[i]} for i in range(count)]


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Worker:
    """One worker process, restarted up to ``restarts_left`` times."""

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    restarts_left: int
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self, mode: str = "wb") -> None:
        """Start in a new session, so that Ctrl-C in the terminal reaches only the parent. Its standard input
        stays open as long as the parent lives."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        error_file(self.log).unlink(missing_ok=True)
        with self.log.open(mode) as log:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def restart(self) -> None:
        self.close()
        self.restarts_left -= 1
        self.start("ab")

    def close(self) -> None:
        """Close the standard input of an ended process."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def message(self) -> str:
        """Return the error that ended it, or the log to read."""
        error = error_file(self.log)
        return error.read_text(encoding="utf-8") if error.exists() else f"see {self.log}"


def outcome(code: int) -> str:
    """Return how a process ended, in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else ENDED.get(code, f"left with {code}")


class Team:
    """All workers of this host's launcher. On exit from the context all of them have ended."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self._ended: set[int] = set()

    def __enter__(self) -> "Team":
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Tell running workers to put their trials back, and wait. A second interrupt ends this process and
        closes their standard input, so they end too."""
        running = [worker for worker in self.workers if worker.is_running]
        for worker in running:
            worker.process.terminate()  # nohup and a shell's & make processes ignore SIGINT
        for worker in running:
            worker.process.wait()
        for worker in self.workers:
            worker.close()

    def look(self) -> list[str]:
        """Restart workers that a signal killed; return what happened since the last call.

        Raises InputError if a worker found wrong input, since all others would too.
        """
        news = []
        for number, worker in enumerate(self.workers):
            code = worker.process.poll()
            if code is None or number in self._ended:
                continue
            if code == InputError.exit_code:
                raise InputError(worker.message())
            if code < 0 and worker.restarts_left:
                worker.restart()
                again = f"restarted ({worker.restarts_left} more times)"
                news.append(f"worker {number} was {outcome(code)}; {again}")
                continue
            self._ended.add(number)
            if code != 0:
                news.append(f"worker {number} {outcome(code)}: {worker.message()}")
        return news

    @property
    def is_at_work(self) -> bool:
        """Whether some worker runs, or has ended since the last `look`."""
        return len(self._ended) < len(self.workers)

    def check_someone_finished(self) -> None:
        """Raise LoraSearchError if no worker reached the end of the study."""
        codes = [worker.process.returncode for worker in self.workers]
        if all(codes):
            first = f"worker 0 {outcome(codes[0])}: {self.workers[0].message()}"
            raise LoraSearchError(f"launcher: every worker ended early; {first}")


class Overview:
    """The progress of all workers on one screen, read from the database at intervals."""

    def __init__(self, config: StudyConfig, progress: Progress, folder: Path) -> None:
        self.config, self.progress, self._folder = config, progress, folder
        self._view: StudyView | None = None
        self._states: dict[int, str] = {}
        self._tokens, self._started = 0, 0.0

    def show(self) -> None:
        """Show the progress of the study and the trials that ended since the last call. If the database does
        not answer, the workers decide what to do; here it only delays the display."""
        try:
            if self._view is None:
                self._open()
            else:
                self._show(self._view)
        except ConfigError:
            self.progress.wait("waiting for the workers to create the study")
        except LoraSearchError as error:
            self.progress.wait(str(error))

    def _open(self) -> None:
        from lora_search.study.view import StudyView  # the sweep's first line does not wait for the database

        view = StudyView(self.config)
        self.progress.log.open(self._folder)
        rows = view.rows()
        self._states = {row.number: row.state for row in rows}
        self._tokens, self._started = sum(row.train_tokens for row in rows), time.monotonic()
        self._view = view

    def _show(self, view: "StudyView") -> None:
        rows = view.rows()
        for row in rows:
            if row.state in ENDS and self._states.get(row.number) != row.state:
                text = (
                    f"trial {row.number} {ENDS[row.state]}: best perplexity {show_perplexity(row.perplexity)}"
                )
                self.progress.event(f"{text} {row.reason}".rstrip())
        self._states = {row.number: row.state for row in rows}
        tokens = sum(row.train_tokens for row in rows) - self._tokens
        seconds = max(1e-3, time.monotonic() - self._started)
        self.progress.update(view.slots(), view.summary(), tokens / seconds)


def run_workers(config: SweepConfig, command: Command, progress: Progress, check: Callable[[], None]) -> None:
    """Start the workers and supervise them until the study is finished. Raises the error that ended them all,
    or the one of ``check``, which is called at intervals."""
    folder = Path(config.runs_dir) / config.study.name
    num_gpus = 0 if config.engine.device == "cpu" else visible_gpus()
    environments = plan_workers(config, num_gpus, os.environ)
    team, overview = make_team(config, command, environments), Overview(config.study, progress, folder)
    places = f"{len(environments)} on one GPU each" if num_gpus else f"{len(environments)} on the CPU"
    with team, progress:
        progress.event(f"workers: {places}; they write to {team.workers[0].log.parent}")
        while team.is_at_work:
            for news in team.look():
                progress.event(news)
            overview.show()
            check()
            time.sleep(LOOK_SECONDS)
    team.check_someone_finished()


def make_team(config: SweepConfig, command: Command, environments: Sequence[Mapping[str, str]]) -> Team:
    """Return the workers, not yet started."""
    folder, restarts = Path(config.runs_dir) / config.study.name / LOGS, config.launcher.max_restarts
    settings = command.environment()
    return Team(
        [
            Worker(
                command.for_worker(number), {**environment, **settings}, folder / f"{number}.log", restarts
            )
            for number, environment in enumerate(environments)
        ]
    )


@contextmanager
def leaving_no_folder(folder: Path) -> Iterator[None]:
    """Where the input is refused, remove the study's folder if it is new and holds the workers' logs only."""
    made = [path for path in (folder, folder.parent) if not path.exists()]
    try:
        yield
    except InputError:
        with suppress(OSError):
            if folder in made and set(os.listdir(folder)) <= {LOGS}:
                shutil.rmtree(folder / LOGS, ignore_errors=True)
                for path in made:
                    path.rmdir()
        raise


@contextmanager
def told_to_launcher(config: SweepConfig) -> Iterator[None]:
    """In a worker: write the error that ends it to a file for the parent, and end when the parent ends."""
    number = config.launcher.worker
    if number is None:
        yield
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        yield
    except LoraSearchError as error:
        path = Path(config.runs_dir) / config.study.name / LOGS / f"{number}.log"
        error_file(path).write_text(redact(str(error)), encoding="utf-8")
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
