"""`python -m tests.benchmarks.pruning`: what the rung rule saves and what it costs, as Markdown tables.

Replays recorded validation curves (the first family of curves.json) through the rule in many orders.
Regret: how much worse the chosen trial is than the best of the same trials, had all been trained to the end.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from optuna.trial import TrialState

from lora_search.search.pruning import RungPruner
from tests.replay import replay

CURVES = Path(__file__).with_name("curves.json")
ORDERS = 200
RULES = (None, *((first, factor) for first in (1, 2) for factor in (2, 3, 4)))
HEADER = (
    "| first rung | reduction factor | resume paused | tokens | regret, mean | regret, worst of 20 "
    "| best trial lost | resumed |\n|---|---|---|---|---|---|---|---|\n"
)


def recorded_curves() -> list[list[float]]:
    trials = json.loads(CURVES.read_text())["faq"]["trials"]
    return [[math.exp(loss) for loss in trial["losses"]] for trial in trials]


@dataclass(frozen=True)
class Case:
    """A sweep to replay: which curves, how many trials of them, in how many slots, with how much noise."""

    title: str
    curves: list[list[float]]
    num_trials: int
    slots: int
    noise: float = 0.0  # standard deviation of every value, relative

    def draws(self) -> Iterator[tuple[list[list[float]], list[list[float]]]]:
        """Yield curves in many orders, as they are and as the rule sees them."""
        for seed in range(ORDERS):
            rng = np.random.default_rng(seed)
            chosen = rng.choice(len(self.curves), size=self.num_trials, replace=False)
            drawn = [self.curves[i] for i in chosen]
            yield drawn, [(c * np.exp(rng.normal(0, self.noise, len(c)))).tolist() for c in drawn]


def row(case: Case, rule: RungPruner | None, resume: bool) -> str:
    """Return one row of the table: means over the orders."""
    tokens, regrets, lost, resumed = [], [], [], []
    for true, seen in case.draws():
        result = replay(seen, case.slots, rule, resume)
        complete = [i for i, state in enumerate(result.states) if state == TrialState.COMPLETE]
        finals, chosen = [min(curve) for curve in true], min(complete, key=[min(c) for c in seen].__getitem__)
        tokens.append(result.num_rungs / sum(len(curve) for curve in true))
        regrets.append(finals[chosen] / min(finals) - 1)
        lost.append(finals[chosen] > min(finals))
        resumed.append(result.num_resumed)
    worst = np.quantile(regrets, 0.95)
    settings = f"{rule.first_rung} | {rule.reduction_factor}" if rule else "no pruning | "
    return (
        f"| {settings} | {'yes' if resume else ''} | {np.mean(tokens):.0%} | {np.mean(regrets):.2%} "
        f"| {worst:.2%} | {np.mean(lost):.0%} | {np.mean(resumed):.1f} |\n"
    )


def write_table(case: Case) -> None:
    what = f"{case.num_trials} of {len(case.curves)} recorded trials, {case.slots} slots"
    sys.stdout.write(f"\n{case.title}: {what}\n\n{HEADER}")
    for settings in RULES:
        rule = RungPruner(*settings) if settings else None
        for resume in (False, True) if rule else (False,):
            sys.stdout.write(row(case, rule, resume))


def main() -> None:
    curves = sorted(recorded_curves(), key=min)
    half, count = curves[: len(curves) // 2], len(curves)
    write_table(Case("The default sweep's size", curves, 10, 4))
    write_table(Case("All of them", curves, count, 8))
    write_table(Case("A narrow search: the better half", half, len(half), 4))
    write_table(Case("All of them, with 5 % of noise on every value", curves, count, 4, noise=0.05))


if __name__ == "__main__":
    main()
