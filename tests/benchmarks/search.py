"""`python -m tests.benchmarks.search [FAMILY ...]`: whole searches, with sampler, at equal training tokens.

Each of 60 tasks is a surrogate of recorded curves (`surrogate`), searched in 4 slots that move a rung at a
time. Regret: how much higher the perplexity of the adapter that a search would hand over is than the task's
best, after the tokens of 3, 6 and 12 full trials. Paired: every contender gets the same tasks.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import optuna
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, Trial, TrialState

from lora_search.database.storage import quieten_optuna
from lora_search.search.pruning import RungPruner, stopped_by_optuna
from lora_search.search.sampling import make_sampler
from lora_search.settings.schema import SamplerConfig
from tests.benchmarks.surrogate import Family, Surrogate, Task, families

TASKS, SLOTS, BUDGETS = 60, 4, (3, 6, 12)  # budgets in full trials
RANKS, BATCHES = (8, 16, 32), (2, 4, 8)
MIDDLE = {"lora.r": 16, "train.batch_size": 4}
PRIOR = 1.3e-3  # of SmolLM2, see search.priors
FIRST = [{**MIDDLE, "optim.lr": lr} for lr in (1e-3, 3 * PRIOR, PRIOR / 3)]
GRID = [
    {"optim.lr": lr, "lora.r": r, "train.batch_size": batch}
    for lr in (1e-4, 7e-4, 5e-3) for r in RANKS for batch in (2, 8)
]  # fmt: skip
Stop = Callable[[Study, Sequence[FrozenTrial]], list[int]]


@dataclass(frozen=True)
class Contender:
    """A way to search."""

    sampler: str = "tpe"
    startup: int = 5
    first: tuple[Mapping[str, float], ...] = ()
    rule: tuple[int, int] | None = None  # ours: first rung, reduction factor
    pruner: Callable[[int], optuna.pruners.BasePruner] | None = None  # Optuna's, for so many rungs
    stop: Stop | None = None  # of another kind

    def stopped(self, study: Study, running: Sequence[FrozenTrial], seed: int) -> list[int]:
        if self.rule is not None:
            return list(RungPruner(*self.rule).losers(study.get_trials(deepcopy=False), running))
        if self.pruner is not None:
            return [t.number for t in stopped_by_optuna(study, running, seed)]
        return [] if self.stop is None else self.stop(study, running)


def top_of_one_rung(study: Study, running: Sequence[FrozenTrial], share: float) -> list[int]:
    """Stop at the first rung, once and for all, what is not among the best so far by that rung's value."""
    values = sorted(
        t.intermediate_values[1] for t in study.get_trials(deepcopy=False) if 1 in t.intermediate_values
    )
    limit = values[max(1, round(share * len(values))) - 1]
    return [
        t.number for t in running if t.last_step == 1 and t.intermediate_values[1] > limit and len(values) > 2
    ]


def guarded(study: Study, running: Sequence[FrozenTrial]) -> list[int]:
    """Stop as our rule does, but not what falls so fast that, if it went on like that, it would be kept."""
    trials = study.get_trials(deepcopy=False)
    losers = RungPruner(1, 3).losers(trials, running)
    best = min(min(t.intermediate_values.values()) for t in trials if t.intermediate_values)
    spared = [t.number for t in running if _extrapolated(t) < best]
    return [number for number in losers if number not in spared]


def _extrapolated(trial: FrozenTrial) -> float:
    """Return the value two rungs on, by the last fall; without one it falls not at all."""
    last, before = (trial.last_step or 0), (trial.last_step or 0) - 1
    values = trial.intermediate_values
    return values[last] ** 3 / values[before] ** 2 if before in values else values[last]


def patient(study: Study, running: Sequence[FrozenTrial]) -> list[int]:
    """Stop as our rule does, and what was not better for two rungs."""
    losers = list(RungPruner(1, 3).losers(study.get_trials(deepcopy=False), running))
    stale = [t.number for t in running if (t.last_step or 0) - _best_rung(t) >= 2]
    return sorted({*losers, *stale})


def _best_rung(trial: FrozenTrial) -> int:
    values = trial.intermediate_values
    return min(values, key=lambda rung: values[rung])


OURS, FIRST_3 = (1, 3), tuple(FIRST)
CONTENDERS = {
    "ours: tpe, first trials, asha": Contender(first=FIRST_3, rule=OURS),
    "tpe, default first, asha (before)": Contender(first=FIRST_3[:1], rule=OURS),
    "startup 3": Contender(first=FIRST_3, rule=OURS, startup=3),
    "random, asha": Contender(sampler="random", rule=OURS),
    "random, first trials, asha": Contender(sampler="random", first=FIRST_3, rule=OURS),
    "tpe, first trials, successive halving": Contender(
        first=FIRST_3, pruner=lambda k: SuccessiveHalvingPruner(1, 3)
    ),
    "random": Contender(sampler="random"),
    "tpe": Contender(),
    "tpe, median": Contender(pruner=lambda k: MedianPruner(n_startup_trials=4, n_warmup_steps=1)),
    "tpe, successive halving": Contender(pruner=lambda k: SuccessiveHalvingPruner(1, 3)),
    "tpe, hyperband": Contender(pruner=lambda k: HyperbandPruner(1, k, 3)),
    "grid 3x3x2": Contender(sampler="random", first=tuple(GRID)),
    "rule: one rung, top quarter": Contender(first=FIRST_3, stop=partial(top_of_one_rung, share=0.25)),
    "rule: one rung, top third": Contender(first=FIRST_3, stop=partial(top_of_one_rung, share=0.34)),
    "rule: asha, guard for late crossings": Contender(first=FIRST_3, stop=guarded),
    "rule: asha and patience 2": Contender(first=FIRST_3, stop=patient),
    "rule: asha, first rung 2": Contender(first=FIRST_3, rule=(2, 3)),
    "rule: asha, factor 2": Contender(first=FIRST_3, rule=(1, 2)),
    "rule: asha, factor 4": Contender(first=FIRST_3, rule=(1, 4)),
}  # fmt: skip


def search(contender: Contender, task: Task, seed: int) -> list[float]:
    """Return the perplexity, without noise, of what the search hands over at each budget."""
    study, space = begin(contender, task.surrogate.family, seed)
    num_rungs = task.surrogate.family.num_rungs
    running: dict[int, tuple[Trial, np.ndarray, np.ndarray]] = {}
    spent, best, found = 0, (np.inf, np.inf), list[float]()
    while len(found) < len(BUDGETS):
        while len(running) < SLOTS:
            trial = study.ask(space)
            running[trial.number] = (trial, *task.seen(trial.params, trial.number))
        for number, (trial, true_K, seen_K) in list(running.items()):
            rung = (study.get_trials(deepcopy=False)[number].last_step or 0) + 1
            trial.report(float(seen_K[rung - 1]), rung)
            best = min(best, (float(seen_K[rung - 1]), float(true_K[rung - 1])))
            spent += 1
            if rung == num_rungs:
                study.tell(number, float(seen_K.min()))
                del running[number]
            if len(found) < len(BUDGETS) and spent >= BUDGETS[len(found)] * num_rungs:
                found.append(best[1])
        for number in contender.stopped(study, [study.get_trials(deepcopy=False)[n] for n in running], seed):
            study.tell(number, state=TrialState.PRUNED)
            del running[number]
    return found


def begin(contender: Contender, family: Family, seed: int) -> tuple[Study, dict[str, BaseDistribution]]:
    """Return a new study with the first trials in line, and its space."""
    space: dict[str, BaseDistribution] = {
        "optim.lr": FloatDistribution(*family.rates, log=True),
        "lora.r": CategoricalDistribution(RANKS),
        "train.batch_size": CategoricalDistribution(BATCHES),
    }
    pruner = contender.pruner(family.num_rungs) if contender.pruner else optuna.pruners.NopPruner()
    config = SamplerConfig(name=contender.sampler, n_startup_trials=contender.startup)
    study = optuna.create_study(
        sampler=make_sampler(config, space, seed), pruner=pruner, study_name=str(seed)
    )
    first = list(contender.first)
    if first == GRID:  # in a random order
        first = [first[i] for i in np.random.default_rng(seed).permutation(len(first))]
    for point in first:
        study.enqueue_trial(dict(point))
    return study, space


def best_possible(task: Task) -> float:
    """Return the lowest perplexity of a dense grid."""
    rates = np.geomspace(*task.surrogate.family.rates, 60)
    points = [
        {"optim.lr": lr, "lora.r": r, "train.batch_size": b} for lr in rates for r in RANKS for b in BATCHES
    ]
    return float(task.curves(points).min())


def main() -> None:
    quieten_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for family in families(*sys.argv[1:]):
        surrogate = Surrogate(family)
        missed = np.abs(surrogate.left_out_NK[:, -1])
        sys.stdout.write(
            f"\n{family.name}: {len(family.params)} curves of {family.num_rungs} rungs; a curve left out is "
            f"missed by {np.median(missed):.1%} of its NLL in the median, one in ten by more than "
            f"{np.quantile(missed, 0.9):.1%}\n\n"
        )
        regrets = {}
        tasks = [surrogate.task(seed) for seed in range(TASKS)]
        best = np.array([best_possible(task) for task in tasks])[:, None]
        for name, contender in CONTENDERS.items():
            found = np.array([search(contender, task, seed) for seed, task in enumerate(tasks)])
            regrets[name] = found / best - 1
            write_row(name, regrets[name], regrets[next(iter(regrets))])


def write_row(name: str, mine: np.ndarray, ours: np.ndarray) -> None:
    """Write mean regrets with the paired difference to the first contender and its standard error."""
    cells = []
    for column in range(len(BUDGETS)):
        difference = mine[:, column] - ours[:, column]
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        cells.append(f"{mine[:, column].mean():.2%} ({difference.mean():+.2%} ± {error:.2%})")
    sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
