"""`python -m tests.benchmarks.search [FAMILY ...] [--truth NAME] ...`: whole searches at equal tokens.

Each of 60 tasks is a truth made of recorded curves (gp: `surrogate`; table, neighbours: `nearby`), searched
in 4 slots that move a rung at a time. Regret: how much higher the perplexity of the adapter that a search
would hand over is than the task's best, after the tokens of 3, 6 and 12 full trials. Paired: every contender
gets the same tasks. Rules are also tuned on one data set's families and judged on the other's. --only takes
the contenders whose names contain one of the texts, beside ours; --slow adds Optuna's Gaussian process.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna

from lora_search.database.storage import quieten_optuna
from tests.benchmarks.contenders import OURS, contenders
from tests.benchmarks.families import Family, families
from tests.benchmarks.nearby import Nearby
from tests.benchmarks.regret_plot import plot
from tests.benchmarks.surrogate import Surrogate

TASKS, SLOTS = 60, 4
SEED_NOISE = 0.0025  # sd of a perplexity between two seeds, relative; measured on SmolLM2
BUDGETS = tuple(range(1, 13))  # in full trials
SHOWN = (3, 6, 12)
Regrets = Mapping[str, np.ndarray]  # contender -> regret of every task at every budget


class Task(Protocol):
    """What is true in one search."""

    def curves(self, params: Sequence[Mapping[str, float]]) -> np.ndarray:
        """Return the perplexities of settings at every rung, without noise, [M, K]."""

    def best(self) -> float:
        """Return the lowest perplexity."""


class Truth(Protocol):
    """A way to fill the space between the recorded curves of a family."""

    @property
    def left_out_NK(self) -> np.ndarray:
        """What it misses, in log NLL, of each curve that it does not know."""

    def task(self, seed: int) -> Task: ...


TRUTHS: Mapping[str, Callable[[Family], Truth]] = {
    "gp": Surrogate,
    "table": partial(Nearby, num_neighbours=1),
    "neighbours": partial(Nearby, num_neighbours=4),
}


def search(contender: Any, family: Family, task: Task, seed: int) -> list[float]:
    """Return the perplexity, without noise, of what the search hands over at each budget."""
    num_rungs, searching = family.num_rungs, contender.begin(family, seed)
    curves: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    running: dict[int, int] = {}  # number -> rungs trained
    spent, best, found = 0, (np.inf, np.inf), list[float]()
    while len(found) < len(BUDGETS):
        while len(running) < SLOTS:
            number, params, trained = searching.suggest()
            running[number] = trained
            curves[number] = curves.get(number) or seen(task, params, [seed, number])
        for number, trained in running.items():
            true_K, seen_K = curves[number]
            best = min(best, (float(seen_K[trained]), float(true_K[trained])))
            running[number] = trained + 1
            spent += 1
            if len(found) < len(BUDGETS) and spent >= BUDGETS[len(found)] * num_rungs:
                found.append(best[1])
        news = {number: (rung, float(curves[number][1][rung - 1])) for number, rung in running.items()}
        for number in searching.report(news):
            del running[number]
    return found


def seen(task: Task, params: Mapping[str, float], seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return one trial's curve without and with the noise of its seed."""
    (true_K,) = task.curves([params])
    return true_K, true_K * math.exp(np.random.default_rng(seed).normal(0, SEED_NOISE))


def regrets_of(family: Family, tasks: Sequence[Task], searches: Mapping[str, Any]) -> Regrets:
    """Search all tasks of a family with every contender, ours first; write a row for each."""
    best = np.array([task.best() for task in tasks])[:, None]
    regrets: dict[str, np.ndarray] = {}
    for name, contender in searches.items():
        found = np.array([search(contender, family, task, seed) for seed, task in enumerate(tasks)])
        regrets[name] = found / best - 1
        write_row(name, regrets[name], regrets[OURS])
    return regrets


def write_row(name: str, mine: np.ndarray, ours: np.ndarray) -> None:
    """Write mean regrets with the paired difference to the first contender and its standard error."""
    cells = []
    for budget in SHOWN:
        column = BUDGETS.index(budget)
        difference, error = paired(mine[:, column] - ours[:, column])
        sure = "**" if abs(difference) > 2 * error > 0 else ""
        cells.append(f"{mine[:, column].mean():.2%} ({sure}{difference:+.2%}{sure} ± {error:.2%})")
    say(f"| {name} | {' | '.join(cells)} |")


def paired(differences: np.ndarray) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))


def tuned(found: Mapping[str, Regrets], on: str) -> str:
    """Return the rule of the lowest regret on a data set's families, each family and budget counting the
    same."""
    columns = [BUDGETS.index(budget) for budget in SHOWN]
    mine = [regrets for family, regrets in found.items() if family.startswith(on)]
    rules = [name for name in mine[0] if name.startswith("rule: ") or name == OURS]

    def score(name: str) -> float:
        means = [(r[name].mean(axis=0) / r[OURS].mean(axis=0))[columns] for r in mine]
        return float(np.mean(means))

    for name in sorted(rules, key=score):
        say(f"| {on} | {name} | {score(name):.2f} |")
    return min(rules, key=score)


def judge(found: Mapping[str, Regrets], rule: str, on: str) -> None:
    """Write how a rule does against the default on families by which it was not chosen."""
    for family, regrets in found.items():
        if family.startswith(on):
            write_row(f"{rule}, on {family}", regrets[rule], regrets[OURS])


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--truth", choices=TRUTHS, default="gp")
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT")
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    quieten_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: dict[str, Regrets] = {}
    searches = {
        name: one
        for name, one in contenders(slow=arguments.slow).items()
        if name == OURS or any(text in name for text in arguments.only)
    }
    for family in families(*arguments.families):
        truth = TRUTHS[arguments.truth](family)
        missed = np.abs(truth.left_out_NK[:, -1])
        say(
            f"\n{family.name}: {len(family.params)} curves of {family.num_rungs} rungs; a curve left out is "
            f"missed by {np.median(missed):.1%} of its NLL in the median, one in ten by more than "
            f"{np.quantile(missed, 0.9):.1%}\n"
        )
        tasks = [truth.task(seed) for seed in range(arguments.tasks)]
        found[family.name] = regrets_of(family, tasks, searches)
    if arguments.plot:
        arguments.plot.write_text(plot(found, BUDGETS))
    if {name[:3] for name in found} == {"faq", "doc"}:
        say("\nrules by their regret relative to the default's, then each data set's best on the other\n")
        for on, other in (("faq", "docs"), ("docs", "faq")):
            judge(found, tuned(found, on), other)


if __name__ == "__main__":
    main()
