"""An engine that trains nothing: a trial in a slot reaches a rung after so many seconds, and measures what
a surrogate of recorded curves says. The clock may be the wall's or a virtual one.

`python -m tests.benchmarks.simulated` is a worker of a launcher with this engine: all else is the product's.
"""

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sqlalchemy import event

from lora_search.database.storage import quieten_optuna
from lora_search.output.tracking import NoTracker
from lora_search.settings.schema import PrunerConfig, SamplerConfig, StudyConfig, SweepConfig, TrainConfig
from lora_search.settings.space import parse_space
from lora_search.study.budget import read_intervals
from lora_search.study.study import SweepStudy
from lora_search.trial import Measurement, TrialRun
from lora_search.worker.command import Command, received
from lora_search.worker.team import told_to_launcher
from lora_search.worker.worker import work
from tests.benchmarks.families import families
from tests.benchmarks.search import Task, seen
from tests.benchmarks.surrogate import Surrogate

RUNGS, SLOTS, NAME = 8, 4, "simulated"
SPACE = {
    "lora": {"r": "choice(8, 16, 32)"},
    "train": {"batch_size": "choice(2, 4, 8)"},
    "optim": {"lr": "tag(log, interval(5e-5, 5e-3))"},
}
KEYS = ("optim.lr", "lora.r", "train.batch_size")


def sweep(storage: str, n_trials: int, sampler: str = "tpe", pruner: str = "asha") -> SweepConfig:
    """Return the settings of a study that is searched with this engine."""
    study = StudyConfig(name=NAME, n_trials=n_trials, storage=storage, first_trial_is_default=False)
    return SweepConfig(
        study=study, train=TrainConfig(epochs=1, evals_per_epoch=RUNGS), space=SPACE,
        sampler=SamplerConfig(name=sampler), pruner=PrunerConfig(name=pruner),
    )  # fmt: skip


def recorded_task() -> Task:
    """Return curves as they were recorded of SmolLM2 on the construction FAQ."""
    return Surrogate(families("faq")[0]).task(0)


def leave_checkpoint(run: TrialRun) -> None:
    """Write what a trial can be resumed from."""
    folder = Path(run.folder) / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").write_bytes(b"x")


@dataclass
class Seated:
    """A trial in a slot, and when it reaches its next rung."""

    run: TrialRun
    curve_K: Sequence[float]
    rung: int
    due: float


class Engine:
    """What `worker.work` asks of an engine. A rung takes ``rung_seconds``, in each trial more or less."""

    tokens_per_second = 1.0

    def __init__(
        self, task: Task, slots: int, rung_seconds: float, now: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self.task, self.rung_seconds, self.now, self.wait = task, rung_seconds, now, wait
        self.slots = range(slots)
        self.seated: dict[int, Seated] = {}
        self.after_pass: Callable[[], None] = lambda: None

    @property
    def free_slots(self) -> int:
        return len(self.slots) - len(self.seated)

    def admit(self, runs: Iterable[TrialRun]) -> None:
        for run in runs:
            settings = run.settings
            point = dict(zip(KEYS, (settings.lr, settings.r, settings.batch_size), strict=True))
            _, seen_K = seen(self.task, point, [0, run.number])
            rung = max(run.perplexities, default=0)
            self.seated[run.number] = Seated(run, seen_K, rung, self.now() + self._seconds(run))

    def advance(self) -> list[Measurement]:
        """Wait until a trial reaches a rung; return what it measures there."""
        if not self.seated:
            return []
        self.wait(max(0.0, min(one.due for one in self.seated.values()) - self.now()))
        return [self._measure(one) for one in list(self.seated.values()) if one.due <= self.now()]

    def release(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.seated.pop(number, None)

    def views(self) -> tuple[()]:
        return ()

    def drop_checkpoint_copy(self, number: int) -> None: ...

    def _seconds(self, run: TrialRun) -> float:
        return self.rung_seconds * (0.75 + 0.5 * (run.number * 0.618 % 1))

    def _measure(self, one: Seated) -> Measurement:
        one.rung, one.due = one.rung + 1, one.due + self._seconds(one.run)
        so_far = one.curve_K[: one.rung]
        best = min(so_far)
        leave_checkpoint(one.run)
        if one.rung == len(one.curve_K):
            del self.seated[one.run.number]
        value = float(one.curve_K[one.rung - 1])
        return Measurement(
            trial_number=one.run.number, rung=one.rung, examples_seen=100 * one.rung,
            train_tokens=1000 * one.rung, train_seconds=1.0, tokens_per_second=1.0,
            validation_loss=math.log(value), perplexity=value, best_rung=1 + list(so_far).index(best),
            best_perplexity=float(best), steps=(), ended="finished" if one.rung == len(one.curve_K) else None,
        )  # fmt: skip


class Silent:
    """A progress that shows nothing."""

    def wait(self, text: str) -> None: ...

    def event(self, text: str) -> None: ...

    def update(self, *_: object) -> None: ...


class SimulatedCommand(Command):
    """A launcher's command for workers of this module. Its overrides: storage, trials, seconds of a rung, how
    many workers begin together."""

    def for_worker(self, number: int, config_dir: Path | None = None) -> list[str]:
        return [sys.executable, "-m", "tests.benchmarks.simulated", f"launcher.worker={number}"]


def train(storage: str, n_trials: int, rung_seconds: float, wait: Callable[[SweepStudy], object]) -> int:
    """Be a worker, from when ``wait`` returns until the study is finished; return how many statements."""
    quieten_optuna()
    config = sweep(storage, n_trials, "random")
    with tempfile.TemporaryDirectory() as folder:
        study, seen = SweepStudy.open(config, parse_space(config), {}, {}, Path(folder)), list[object]()
        wait(study)
        event.listen(study.storage.engine, "before_cursor_execute", lambda *_: seen.append(None))
        engine = Engine(recorded_task(), SLOTS, rung_seconds)
        work(study, engine, NoTracker(), Silent())  # type: ignore[arg-type]
        study.storage.engine.dispose()
    return len(seen)


def wait_for_workers(study: SweepStudy, together: int) -> None:
    """Wait until so many have opened the study."""
    while len(read_intervals(study.storage, study.table.study_id)) < together:
        time.sleep(0.1)


def main() -> int:
    storage, n_trials, rung_seconds, together = received().overrides
    with told_to_launcher(True):
        train(storage, int(n_trials), float(rung_seconds), partial(wait_for_workers, together=int(together)))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
