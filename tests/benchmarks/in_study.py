"""`python -m tests.benchmarks.in_study [--truth TRUTH] [--trials N] FAMILY ...`: freeze-thaw in real studies.

The study, its database and the worker are the product's; the engine is `simulated`, its slots in step. Study
and `search` go through the same 16 tasks with the same first trials; their random draws differ. --trials
compares two studies of N trials: freeze-thaw and asha. Families whose first rung may be the bare base are
left to the replay: the simulated engine has no warm-up.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
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
from tests.benchmarks.search import BUDGETS, TRUTHS, Task, paired, search, seen
from tests.benchmarks.simulated import SLOTS, SPACE, Engine, Silent

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


def sweep(family: Family, seed: int, study: StudyConfig, pruner: str) -> SweepConfig:
    """Return a sweep with the first trials of `contenders`."""
    low, high = family.rates
    return SweepConfig(
        seed=seed, study=study, train=TrainConfig(epochs=1, evals_per_epoch=family.num_rungs, batch_size=4),
        lora=LoraConfig(r=16), optim=OptimConfig(lr=1e-3), pruner=PrunerConfig(name=pruner),
        space={**SPACE, "optim": {"lr": f"tag(log, interval({low}, {high}))"}},
    )  # fmt: skip


def searched(family: Family, task: Task, config: SweepConfig) -> tuple[float, float]:
    """Return how much higher than the task's best the true perplexity of the study's best is, and how many
    rungs it trained, in full trials."""
    with tempfile.TemporaryDirectory() as folder:
        config.study.storage, clock = f"sqlite:///{folder}/study.db", Clock()
        known = {BASE_WIDTH: str(SMOLLM2_WIDTH), "data.train_tokens": str(family.num_rungs * RUNG_TOKENS)}
        study = SweepStudy.open(config, parse_space(config), {}, known, Path(folder))
        work(study, InStep(task, SLOTS, 1.0, clock, clock.wait), NoTracker(), Silent())  # type: ignore[arg-type]
        rows = {row.number: row for row in study.rows()}
        study.storage.engine.dispose()
    found = {(row.number, rung): v for row in rows.values() for rung, v in row.perplexities.items()}
    number, rung = min(found, key=lambda place: found[place])
    true_K, _ = seen(task, rows[number].params, [0, number])  # type: ignore[arg-type]
    return float(true_K[rung - 1]) / task.best() - 1, len(found) / family.num_rungs


def regret_in_study(family: Family, task: Task, seed: int, budget: int) -> float:
    tokens = budget * family.num_rungs * RUNG_TOKENS
    study = StudyConfig(n_trials=None, max_tokens=tokens)
    return searched(family, task, sweep(family, seed, study, "freeze_thaw"))[0]


def regret_in_replay(family: Family, task: Task, seed: int, budget: int) -> float:
    found = search(FreezeThawSearch, family, task, seed)[BUDGETS.index(budget)]
    return found / task.best() - 1


def compare_with_replay(family: Family, tasks: Sequence[Task]) -> Iterator[str]:
    """Yield the rows of the table: regrets after so many full trials."""
    for budget in SHOWN:
        study, replay = (
            np.array([regret(family, task, seed, budget) for seed, task in enumerate(tasks)])
            for regret in (regret_in_study, regret_in_replay)
        )
        difference, error = paired(study - replay)
        means = f"{study.mean():.2%} | {replay.mean():.2%} | {difference:+.2%} ± {error:.2%}"
        yield f"| {family.name} | {budget} | {means} |\n"


def compare_with_asha(family: Family, tasks: Sequence[Task], n_trials: int) -> Iterator[str]:
    """Yield the row of the table: regrets, and what was trained for them in full trials."""
    thaw, asha = (
        np.array(
            [
                searched(family, task, sweep(family, seed, StudyConfig(n_trials=n_trials), pruner))
                for seed, task in enumerate(tasks)
            ]
        )
        for pruner in ("freeze_thaw", "asha")
    )
    difference, error = paired(thaw[:, 0] - asha[:, 0])
    cells = (f"{one[:, 0].mean():.2%} after {one[:, 1].mean():.1f}" for one in (thaw, asha))
    yield f"| {family.name} | {n_trials} | {' | '.join(cells)} | {difference:+.2%} ± {error:.2%} |\n"


def main() -> None:
    quieten_optuna()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--truth", choices=TRUTHS, default="gp")
    parser.add_argument("--trials", type=int)
    parser.add_argument("families", nargs="+")
    told = parser.parse_args()
    heads = ("trials", "freeze-thaw", "asha") if told.trials else ("full trials", "study", "replay")
    sys.stdout.write(f"| family | {' | '.join(heads)} | difference |\n|---|---|---|---|---|\n")
    for family in families(*told.families):
        truth = TRUTHS[told.truth](family)
        tasks = [truth.task(seed) for seed in range(TASKS)]
        rest = compare_with_asha(family, tasks, told.trials) if told.trials else ()
        for row in rest or compare_with_replay(family, tasks):
            sys.stdout.write(row)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
