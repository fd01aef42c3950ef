"""launcher=slurm: the workers are an array of Slurm jobs, submitted with submitit from a shared folder.

Before its time limit a job has its worker put its trials back, and asks to be queued again. Cancelled or
preempted (SIGTERM) it only puts them back: Slurm queues it again, or the driver submits another. A killed
driver leaves the jobs at work. Settings travel in the environment of the jobs, as in an sbatch script.
Importing this module imports no submitit.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_search.errors import ConfigError
from lora_search.settings.schema import SweepConfig
from lora_search.settings.secrets import redact
from lora_search.worker.command import Command
from lora_search.worker.interrupts import EXIT_CODE
from lora_search.worker.on_ray import load
from lora_search.worker.seat import Order, Report, Reports, Seat, Tail

ORDER_VARIABLE = "LORA_SEARCH_ORDER"
MINUTES = 240
NOTICE_SECONDS = 180  # before the time limit: enough for a pass, a checkpoint and its upload
NOTICE_PER_MINUTE = 15  # of a short time limit: Slurm may give notice a minute early
NO_LIMIT = 1_000_000  # to how often a job may reach its time limit and be queued again
POLL_SECONDS = 1.0
QUEUE_SECONDS = 10.0  # between two questions to Slurm


@dataclass
class Task:
    """What a job runs: a seat until its worker has ended, or the driver says stop."""

    number: int
    log: Path

    def __call__(self) -> Report:
        signal.signal(signal.SIGTERM, _leave)  # submitit ignores it
        self.seat = Seat(read_order(os.environ.pop(ORDER_VARIABLE)), self.number, self.log)
        try:
            return self._attend()
        except SystemExit:
            self.seat.stop()
            raise  # without a result: the job is queued again, or another takes its place

    def _attend(self) -> Report:
        while (report := self.seat.look()).code is None:
            if report.news:  # the driver reads the log
                with self.log.open("a", encoding="utf-8") as log:
                    log.write(f"the worker {report.news}\n")
            time.sleep(POLL_SECONDS)
            if stop_file(self.log.parent).exists():
                break
        return dataclasses.replace(self.seat.stop(), lines=[])

    def checkpoint(self) -> Any:
        """Put the trials back; return what runs when the job's turn has come again."""
        self.seat.stop()
        submitit = load("submitit", "slurm")
        return submitit.helpers.DelayedSubmission(Task(self.number, self.log))


def _leave(*_: object) -> None:
    """End the job: Slurm cancels it, and kills it soon."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(EXIT_CODE)


class SlurmTeam:
    """All jobs of one driver. On exit from the context all of them have ended."""

    shows_logs = True

    def __init__(self, config: SweepConfig, order: Order, logs: Path) -> None:
        """Raises InputError where submitit or Slurm is missing."""
        self._submitit = load("submitit", "slurm")
        self._config, self._order, self._logs = config, order, logs.absolute()
        self._reports = Reports(logs)
        self._jobs: dict[int, Any] = {}
        self._tails: dict[int, Tail] = {}
        self._restarts_left: dict[int, int] = {}
        self._asked, self._known = float("-inf"), dict[str, str]()
        self._executor = make_executor(self._submitit, config, self._logs / "jobs")

    def __enter__(self) -> "SlurmTeam":
        """Submit the jobs. Raises ConfigError if Slurm refuses them."""
        stop_file(self._logs).unlink(missing_ok=True)
        count = self._config.launcher.workers or 1
        for number in range(count):
            (self._logs / f"{number}.log").unlink(missing_ok=True)
            self._tails[number] = Tail(self._logs / f"{number}.log")
            self._restarts_left[number] = self._config.launcher.max_restarts
        self._submit(range(count))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Have the workers put their trials back, cancel jobs that wait for their turn, and wait. A second
        interrupt ends this process; the jobs end all the same."""
        stop_file(self._logs).touch()
        waiting = {number for number, state in self._states().items() if state == "PENDING"}
        for number in waiting:
            self._jobs[number].cancel(check=False)
        left = set(self._jobs) - waiting
        while left := {number for number in left if not self._has_left(number)}:
            time.sleep(POLL_SECONDS)
        shutil.rmtree(self._logs / "jobs", ignore_errors=True)
        stop_file(self._logs).unlink(missing_ok=True)

    @property
    def places(self) -> str:
        """Return what was submitted, in words."""
        ids = ", ".join(dict.fromkeys(str(job.job_id).partition("_")[0] for job in self._jobs.values()))
        return f"{len(self._jobs)} as {self._config.launcher.cluster or 'slurm'} jobs {ids}"

    @property
    def is_at_work(self) -> bool:
        """Whether some worker may still train."""
        return not self._reports.is_finished and len(self._reports.ended) < len(self._jobs)

    def look(self) -> list[str]:
        """Return what the workers' logs and Slurm say. Raises InputError if a worker found wrong input."""
        news = []
        for number, tail in self._tails.items():
            news += [f"worker {number} | {line}" for line in tail.read()]
        for number in [n for n in self._jobs if n not in self._reports.ended and self._has_left(n)]:
            news += self._end(number)
        return news

    def check_someone_finished(self) -> None:
        """Raise LoraSearchError if no worker reached the end of the study."""
        self._reports.check_someone_finished()

    def _end(self, number: int) -> list[str]:
        """Keep the report of a job that has left, or submit another in its place."""
        job = self._jobs[number]
        if job.paths.result_pickle.exists() and job.exception() is None:
            return self._reports.take(number, job.result())
        if not self._restarts_left[number]:
            cause = "its job left without a result"
            return self._reports.take(
                number, Report(place="slurm", start=str(job.job_id), code=1, message=cause)
            )
        self._restarts_left[number] -= 1
        self._submit([number])
        left = f"({self._restarts_left[number]} more times)"
        return [f"worker {number}: its job left before the end of the study; submitted again {left}"]

    def _has_left(self, number: int) -> bool:
        """Whether the job has a result, or is unknown to Slurm by now."""
        job = self._jobs[number]
        if job.paths.result_pickle.exists():
            return True
        return number not in self._states()

    def _states(self) -> dict[int, str]:
        """Return the state of each job that Slurm knows, asked at intervals."""
        if self._config.launcher.cluster == "local":
            return {n: "RUNNING" for n, job in self._jobs.items() if job.state == "RUNNING"}
        if time.monotonic() - self._asked > QUEUE_SECONDS:
            ids = [job.job_id for job in self._jobs.values()]
            self._known, self._asked = queue(ids, self._known), time.monotonic()
        numbers = {str(job.job_id): number for number, job in self._jobs.items()}
        return {numbers[name]: state for name, state in self._known.items() if name in numbers}

    def _submit(self, numbers: Any) -> None:
        tasks = {number: Task(number, self._logs / f"{number}.log") for number in numbers}
        try:
            with ordered(self._order), self._executor.batch():
                jobs = {number: self._executor.submit(task) for number, task in tasks.items()}
        except (self._submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            said = redact(str(error).strip().splitlines()[-1])
            rule = f"must be one that takes the jobs ({said})"
            remedy = "Compare with sinfo, or give launcher.partition and launcher.sbatch"
            raise ConfigError("launcher.partition", self._config.launcher.partition, rule, remedy) from None
        self._jobs |= jobs
        self._known |= {str(job.job_id): "PENDING" for job in jobs.values()}
        self._asked = float("-inf")


def make_executor(submitit: Any, config: SweepConfig, folder: Path) -> Any:
    """Return submitit's executor with the settings of a job. Raises ConfigError without Slurm."""
    launcher = config.launcher
    minutes = launcher.minutes or MINUTES
    chosen = launcher.gpus_per_worker
    gpus = int(config.engine.devices_per_worker if chosen is None else chosen)
    gpus = 0 if config.engine.device == "cpu" else gpus
    try:
        cluster = launcher.cluster or "slurm"
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=NO_LIMIT)
    except RuntimeError:
        rule, remedy = "needs Slurm's sbatch and srun on this machine", "Run the command on a login node"
        raise ConfigError("launcher.name", "slurm", rule, remedy) from None
    executor.update_parameters(
        name=config.study.name,
        timeout_min=minutes,
        cpus_per_task=launcher.cpus_per_worker or 1,
        stderr_to_stdout=True,
        slurm_signal_delay_s=min(NOTICE_SECONDS, NOTICE_PER_MINUTE * minutes),
        slurm_array_parallelism=launcher.workers or 1,
        slurm_additional_parameters=launcher.sbatch_options(),
        **({"gpus_per_node": gpus} if gpus else {}),
        **({"slurm_partition": launcher.partition} if launcher.partition else {}),
    )
    return executor


def queue(ids: list[Any], known: dict[str, str]) -> dict[str, str]:
    """Return the state of each job that Slurm's queue has; what was ``known`` if Slurm does not answer."""
    arrays = ",".join(sorted({str(name).partition("_")[0] for name in ids}))
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={arrays}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        return known
    return dict(line.split() for line in done.stdout.splitlines())


def stop_file(logs: Path) -> Path:
    """Return the file that tells the jobs to stop: a signal could reach a worker twice, or a job too late."""
    return logs / "stop"


@contextmanager
def ordered(order: Order) -> Iterator[None]:
    """Inside, what is submitted gets the order in its environment, and no other trace of it is written."""
    os.environ[ORDER_VARIABLE] = json.dumps(asdict(order))
    try:
        yield
    finally:
        with suppress(KeyError):
            del os.environ[ORDER_VARIABLE]


def read_order(text: str) -> Order:
    """Return the order of a job, from its environment."""
    content = json.loads(text)
    command = Command(**{**content["command"], "overrides": tuple(content["command"]["overrides"])})
    return Order(**{**content, "command": command})
