"""launcher=local: worker processes that share one study, one per visible GPU, under one parent.

A worker is the same command with `launcher.worker=N`; it works as launcher=inline does and writes to
runs/<study>/workers/N.log. The parent imports no torch and trains nothing: it shows the study, starts again
what a signal killed, and passes an interrupt on. A worker gets its settings, which may hold passwords, by
environment: command lines are there for everybody to read.
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
LOOK_SECONDS = 1.0  # between two looks at the workers and the study
ENDS = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
ENDED = {0: "done", 1: "failed", 2: "wrong input", 130: "interrupted"}


def visible_gpus() -> int:
    """Return how many GPUs torch sees; asked in a process of its own, so that this one stays small."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def plan_workers(config: SweepConfig, num_gpus: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Return each worker's environment: its own GPU, or its share of the cores.

    ``num_gpus`` is 0 where engine.device=cpu. Raises ConfigError if there are more workers than GPUs.
    """
    device, workers = config.engine.device, config.launcher.workers
    require(
        device in ("auto", "cpu", "cuda"),
        "engine.device",
        device,
        "must be auto, cpu or cuda with launcher=local, where each worker has a GPU of its own",
        "Choose GPUs by CUDA_VISIBLE_DEVICES",
    )
    require(
        num_gpus == 0 or workers is None or workers <= num_gpus,
        "launcher.workers",
        workers,
        f"must be at most {num_gpus}, the visible GPUs",
        "Lower it, or set engine.device=cpu",
    )
    count = workers or num_gpus or 1
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(num_gpus)]
    threads = str(max(1, num_cores() // count))
    common = {"OMP_NUM_THREADS": threads, **environment}
    if num_gpus == 0:
        return [common] * count
    return [common | {"CUDA_VISIBLE_DEVICES": gpus[i]} for i in range(count)]


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Worker:
    """One worker process, started again as often as it may be."""

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    restarts_left: int
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self, mode: str = "wb") -> None:
        """Start in a session of its own: a Ctrl-C in the terminal reaches the parent only. Its standard input
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
        """Return what it said at its end, or where to read it."""
        told = error_file(self.log)
        return told.read_text(encoding="utf-8") if told.exists() else f"see {self.log}"


def outcome(code: int) -> str:
    """Return how a process ended, in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else ENDED.get(code, f"left with {code}")


class Team:
    """All workers of this host's launcher. As a context it leaves none behind."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self._ended: set[int] = set()

    def __enter__(self) -> "Team":
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ask those that still run to hand back their trials, and wait. A second interrupt ends this process,
        and with its end of their standard input they leave too."""
        running = [worker for worker in self.workers if worker.is_running]
        for worker in running:
            worker.process.terminate()  # a SIGINT may be ignored: nohup, a shell's &
        for worker in running:
            worker.process.wait()
        for worker in self.workers:
            worker.close()

    def look(self) -> list[str]:
        """Start again what a signal killed; return what happened since the last look.

        Raises InputError if a worker found wrong input: so would all others.
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
                again = f"is started again ({worker.restarts_left} more times)"
                news.append(f"worker {number} was {outcome(code)}; it {again}")
                continue
            self._ended.add(number)
            if code != 0:
                news.append(f"worker {number} {outcome(code)}: {worker.message()}")
        return news

    @property
    def is_at_work(self) -> bool:
        """Whether some worker runs, or has not been looked at since it ended."""
        return len(self._ended) < len(self.workers)

    def check_someone_finished(self) -> None:
        """Raise LoraSearchError if no worker came to the end of the study."""
        codes = [worker.process.returncode for worker in self.workers]
        if all(codes):
            first = f"worker 0 {outcome(codes[0])}: {self.workers[0].message()}"
            raise LoraSearchError(f"launcher: every worker ended early; {first}")


class Overview:
    """The study of all workers on one screen, read from the database now and then."""

    def __init__(self, config: StudyConfig, progress: Progress, folder: Path) -> None:
        self.config, self.progress, self._folder = config, progress, folder
        self._view: StudyView | None = None
        self._states: dict[int, str] = {}
        self._tokens, self._started = 0, 0.0

    def show(self) -> None:
        """Show where the study stands and which trials have ended since the last time. A database that does
        not answer is the workers' to decide on; here it only leaves the screen as it was."""
        try:
            if self._view is None:
                self._open()
            else:
                self._show(self._view)
        except ConfigError:
            self.progress.wait("the workers get ready; there is no study yet")
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
    """Start the workers and look after them until the study is through. Raises what ended them all, and
    what ``check``, called now and then, does."""
    folder = Path(config.runs_dir) / config.study.name
    num_gpus = 0 if config.engine.device == "cpu" else visible_gpus()
    environments = plan_workers(config, num_gpus, os.environ)
    team, overview = make_team(config, command, environments), Overview(config.study, progress, folder)
    places = f"{len(environments)} on GPUs of their own" if num_gpus else f"{len(environments)} on the CPU"
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
    """In a worker: leave the message that ends it where the parent finds it, and end when the parent does."""
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
    """Return where a worker leaves the message that ended it."""
    return log.with_suffix(".error")


def _end_with_parent() -> None:
    """Wait for the end of standard input, which the parent holds open; then interrupt this process: nobody
    looks after it any more, and the next start of the sweep wants its GPU."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
