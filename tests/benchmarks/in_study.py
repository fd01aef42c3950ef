"""`python -m tests.benchmarks.in_study FAMILY ...`: freeze-thaw in real studies and in `search`.

The study, its database and the worker are the product's; the engine is `simulated`, its slots in step. Both
search the same 16 tasks with the same first trials; their random draws differ. Families whose first rung may
be the bare base are left to the replay: the simulated engine has no warm-up.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from lora_search.database.storage import quieten_optuna
from lora_search.output.tracking import NoTracker
from lora_search.settings.schema import (
    LoraConfig,
    OptimConfig,
    PrunerConfig,
    StudyConfig,
    SweepConfig,
    TrainConfig,
)
from lora_search.settings.space import parse_space
from lora_search.study.study import BASE_WIDTH, SweepStudy
from lora_search.trial import TrialRun
from lora_search.worker.worker import work
from tests.benchmarks.contenders import FreezeThawSearch
from tests.benchmarks.families import Family, families
from tests.benchmarks.search import BUDGETS, Task, paired, search, seen
from tests.benchmarks.simulated import SLOTS, SPACE, Engine, Silent
from tests.benchmarks.surrogate import Surrogate

TASKS, SHOWN, RUNG_TOKENS = 16, (3, 12), 1000
SMOLLM2_WIDTH = 576


class Clock:
    """A clock that only waiting moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class InStep(Engine):
    """Every trial takes the same time for a rung."""

    def _seconds(self, run: TrialRun) -> float:
        return self.rung_seconds


def sweep(family: Family, storage: str, seed: int, budget: int) -> SweepConfig:
    """Return a sweep with the tokens of so many full trials and the first trials of `contenders`."""
    low, high = family.rates
    tokens = budget * family.num_rungs * RUNG_TOKENS
    return SweepConfig(
        seed=seed, study=StudyConfig(n_trials=None, max_tokens=tokens, storage=storage),
        train=TrainConfig(epochs=1, evals_per_epoch=family.num_rungs, batch_size=4), lora=LoraConfig(r=16),
        optim=OptimConfig(lr=1e-3), pruner=PrunerConfig(name="freeze_thaw"),
        space={**SPACE, "optim": {"lr": f"tag(log, interval({low}, {high}))"}},
    )  # fmt: skip


def regret_in_study(family: Family, task: Task, seed: int, budget: int) -> float:
    """Return how much higher than the task's best the true perplexity of the study's best is."""
    with tempfile.TemporaryDirectory() as folder:
        config, clock = sweep(family, f"sqlite:///{folder}/study.db", seed, budget), Clock()
        known = {BASE_WIDTH: str(SMOLLM2_WIDTH), "data.train_tokens": str(family.num_rungs * RUNG_TOKENS)}
        study = SweepStudy.open(config, parse_space(config), {}, known, Path(folder))
        work(study, InStep(task, SLOTS, 1.0, clock, clock.wait), NoTracker(), Silent())  # type: ignore[arg-type]
        rows = {row.number: row for row in study.rows()}
        study.storage.engine.dispose()
    found = {(row.number, rung): v for row in rows.values() for rung, v in row.perplexities.items()}
    number, rung = min(found, key=lambda place: found[place])
    true_K, _ = seen(task, rows[number].params, [0, number])  # type: ignore[arg-type]
    return float(true_K[rung - 1]) / task.best() - 1


def regret_in_replay(family: Family, task: Task, seed: int, budget: int) -> float:
    found = search(FreezeThawSearch, family, task, seed)[BUDGETS.index(budget)]
    return found / task.best() - 1


def main() -> None:
    quieten_optuna()
    sys.stdout.write("| family | full trials | study | replay | difference |\n|---|---|---|---|---|\n")
    for family in families(*sys.argv[1:]):
        truth = Surrogate(family)
        tasks = [truth.task(seed) for seed in range(TASKS)]
        for budget in SHOWN:
            study, replay = (
                np.array([regret(family, task, seed, budget) for seed, task in enumerate(tasks)])
                for regret in (regret_in_study, regret_in_replay)
            )
            difference, error = paired(study - replay)
            means = f"{study.mean():.2%} | {replay.mean():.2%} | {difference:+.2%} ± {error:.2%}"
            sys.stdout.write(f"| {family.name} | {budget} | {means} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
