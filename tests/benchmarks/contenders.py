"""Ways to search, for `search`: samplers and rules on Optuna's study, Syne Tune's ASHA, SMAC3's Hyperband.

Each asks for settings, with the rungs that these have trained already, and says after every tick which of
the running ones end. The last two need packages of their own; without them they are left out
(docs/pruning.md says how to install them).
"""

import importlib.util
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import optuna
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, Trial, TrialState

from lora_search.search.freeze_thaw import Curves, FreezeThaw
from lora_search.search.pruning import RungPruner, stopped_by_optuna
from lora_search.search.sampling import make_sampler
from lora_search.settings.schema import SamplerConfig
from tests.benchmarks.families import BATCHES, RANKS, Family

PRIOR = 1.3e-3  # of SmolLM2, see search.priors
FIRST = tuple({"lora.r": 16, "train.batch_size": 4, "optim.lr": lr} for lr in (1e-3, 3 * PRIOR, PRIOR / 3))
GRID = tuple(
    {"optim.lr": lr, "lora.r": r, "train.batch_size": batch}
    for lr in (1e-4, 7e-4, 5e-3) for r in RANKS for batch in (2, 8)
)  # fmt: skip
Stop = Callable[[Study, Sequence[FrozenTrial]], list[int]]


class Search(Protocol):
    """One search under way."""

    def suggest(self) -> tuple[int, Mapping[str, Any], int]:
        """Return settings, their number, and how many rungs they have trained."""

    def report(self, news: Mapping[int, tuple[int, float]]) -> set[int]:
        """Take the rung and perplexity of every running number; return those that end here."""


@dataclass(frozen=True)
class Contender:
    """A way to search on Optuna's study."""

    sampler: str = "tpe"
    startup: int = 5
    first: tuple[Mapping[str, float], ...] = FIRST
    rule: tuple[int, int] | None = None  # ours: first rung, reduction factor
    pruner: Callable[[int], optuna.pruners.BasePruner] | None = None  # Optuna's, for so many rungs
    stop: Stop | None = None  # of another kind

    def begin(self, family: Family, seed: int) -> Search:
        return OptunaSearch(self, family, seed)

    def stopped(self, study: Study, running: Sequence[FrozenTrial], seed: int) -> list[int]:
        if self.rule is not None:
            return list(RungPruner(*self.rule).losers(study.get_trials(deepcopy=False), running))
        if self.pruner is not None:
            return [t.number for t in stopped_by_optuna(study, running, seed)]
        return [] if self.stop is None else self.stop(study, running)


class OptunaSearch:
    """The first trials, then what the sampler draws; all are judged after all have reported."""

    def __init__(self, contender: Contender, family: Family, seed: int) -> None:
        self.contender, self.seed, self.num_rungs = contender, seed, family.num_rungs
        self.family = family
        self.space: dict[str, BaseDistribution] = {
            "optim.lr": FloatDistribution(*family.rates, log=True),
            "lora.r": CategoricalDistribution(RANKS),
            "train.batch_size": CategoricalDistribution(BATCHES),
        }
        pruner = contender.pruner(self.num_rungs) if contender.pruner else optuna.pruners.NopPruner()
        config = SamplerConfig(name=contender.sampler, n_startup_trials=contender.startup)
        sampler = make_sampler(config, self.space, seed)
        self.study = optuna.create_study(sampler=sampler, pruner=pruner, study_name=str(seed))
        order = np.random.default_rng(seed).permutation(len(contender.first))
        first = [contender.first[i] for i in order] if contender.first is GRID else contender.first
        for point in first:
            self.study.enqueue_trial(dict(point))
        self.trials: dict[int, Trial] = {}

    def suggest(self) -> tuple[int, Mapping[str, Any], int]:
        trial = self.study.ask(self.space)
        trial.set_user_attr("progress", {"untrained_rung": self.family.untrained_rung(trial.params)})
        self.trials[trial.number] = trial
        return trial.number, trial.params, 0

    def report(self, news: Mapping[int, tuple[int, float]]) -> set[int]:
        for number, (rung, value) in news.items():
            self.trials[number].report(value, rung)
        known = self.study.get_trials(deepcopy=False)
        done = {number for number, (rung, _) in news.items() if rung == self.num_rungs}
        for number in done:
            self.study.tell(number, min(known[number].intermediate_values.values()))
        running = [self.study.get_trials(deepcopy=False)[n] for n in news if n not in done]
        stopped = self.contender.stopped(self.study, running, self.seed)
        for number in stopped:
            self.study.tell(number, state=TrialState.PRUNED)
        return {*done, *stopped}


class FreezeThawSearch:
    """Freeze-thaw, after the same first trials. It decides anew about every slot at every rung."""

    NEW, SLOTS = 100, 4
    RATE_SPREAD = 1.5  # nats around the prior's learning rate within which much is promised

    @classmethod
    def begin(cls, family: Family, seed: int) -> Search:
        return cls(family, seed)

    def __init__(self, family: Family, seed: int) -> None:
        self.family, self.rng = family, np.random.default_rng(seed)
        self.freeze_thaw = FreezeThaw(3, family.num_rungs, seed)
        self.curves, self.params, self.next = Curves(), list[Mapping[str, Any]](), list[int]()

    def suggest(self) -> tuple[int, Mapping[str, Any], int]:
        if not self.params:
            self.next = [self._begin(params) for params in (*FIRST, self._draw())]
        elif not self.next:
            new, known = [self._draw() for _ in range(self.NEW)], len(self.params)
            points, promises = [self._point(one) for one in new], [self._promise(one) for one in new]
            chosen = self.freeze_thaw.choose(self.curves, points, promises, self.SLOTS)
            self.next = [n if n < known else self._begin(new[n - known]) for n in chosen]
        number = self.next.pop(0)
        return number, self.params[number], len(self.curves.values[number])

    def report(self, news: Mapping[int, tuple[int, float]]) -> set[int]:
        for number, (rung, perplexity) in news.items():
            is_bare = rung <= self.family.untrained_rung(self.params[number])
            self.curves.values[number].append(math.nan if is_bare else math.log(perplexity))
        return set(news)

    def _begin(self, params: Mapping[str, Any]) -> int:
        self.params.append(params)
        self.curves.points.append(self._point(params))
        self.curves.promises.append(self._promise(params))
        self.curves.values.append([])
        return len(self.params) - 1

    def _draw(self) -> dict[str, Any]:
        low, high = self.family.rates
        r, batch = self.rng.integers(len(RANKS)), self.rng.integers(len(BATCHES))
        lr = low * (high / low) ** self.rng.random()
        return {"optim.lr": lr, "lora.r": RANKS[r], "train.batch_size": BATCHES[batch]}

    def _point(self, params: Mapping[str, Any]) -> list[float]:
        low, high = self.family.rates
        rate = math.log(params["optim.lr"] / low) / math.log(high / low)
        return [rate, RANKS.index(params["lora.r"]) / 2, BATCHES.index(params["train.batch_size"]) / 2]

    def _promise(self, params: Mapping[str, Any]) -> float:
        return math.exp(-0.5 * (math.log(params["optim.lr"] / PRIOR) / self.RATE_SPREAD) ** 2)


class SyneTuneAsha:
    """Syne Tune's own scheduler, as it comes: random settings, reduction factor 3, judged one by one."""

    @classmethod
    def begin(cls, family: Family, seed: int) -> Search:
        return cls(family, seed)

    def __init__(self, family: Family, seed: int) -> None:
        from syne_tune.config_space import choice, loguniform
        from syne_tune.optimizer.schedulers.asha import AsynchronousSuccessiveHalving

        space = {
            "optim.lr": loguniform(*family.rates),
            "lora.r": choice(list(RANKS)),
            "train.batch_size": choice(list(BATCHES)),
        }
        self.scheduler = AsynchronousSuccessiveHalving(
            space, metric="perplexity", time_attr="rung", max_t=family.num_rungs, random_seed=seed
        )
        self.trials: list[Any] = []

    def suggest(self) -> tuple[int, Mapping[str, Any], int]:
        from syne_tune.backend.trial_status import Trial as SyneTrial

        config = self.scheduler.suggest().config
        self.trials.append(SyneTrial(len(self.trials), config, None))
        self.scheduler.on_trial_add(self.trials[-1])
        return len(self.trials) - 1, config, 0

    def report(self, news: Mapping[int, tuple[int, float]]) -> set[int]:
        results = {number: {"rung": rung, "perplexity": value} for number, (rung, value) in news.items()}
        decided = {n: self.scheduler.on_trial_result(self.trials[n], one) for n, one in results.items()}
        return {number for number, decision in decided.items() if decision != "CONTINUE"}


class SmacHyperband:
    """SMAC3's facade for several fidelities: Hyperband with a random forest. It asks for settings again with
    a larger budget; only the rungs that they have not trained yet are counted."""

    @classmethod
    def begin(cls, family: Family, seed: int) -> Search:
        return cls(family, seed)

    def __init__(self, family: Family, seed: int) -> None:
        from ConfigSpace import Categorical, ConfigurationSpace, Float
        from smac import MultiFidelityFacade, Scenario

        space = ConfigurationSpace(seed=seed)
        space.add(
            Float("optim.lr", family.rates, log=True),
            Categorical("lora.r", RANKS),
            Categorical("train.batch_size", BATCHES),
        )
        scenario = Scenario(
            space, n_trials=10_000, min_budget=1, max_budget=family.num_rungs, seed=seed, deterministic=True,
            output_directory=tempfile.mkdtemp(),
        )  # fmt: skip
        self.facade = MultiFidelityFacade(scenario, _never_called, overwrite=True, logging_level=40)
        self.jobs: dict[int, Any] = {}
        self.values: dict[int, list[float]] = {}

    def suggest(self) -> tuple[int, Mapping[str, Any], int]:
        while True:
            job = self.facade.ask()
            number = job.config.config_id
            known = self.values.setdefault(number, [])
            if len(known) < round(job.budget):
                self.jobs[number] = job
                return number, dict(job.config), len(known)
            self._tell(job, known)

    def report(self, news: Mapping[int, tuple[int, float]]) -> set[int]:
        done = set()
        for number, (rung, value) in news.items():
            self.values[number].append(value)
            if rung >= round(self.jobs[number].budget):
                self._tell(self.jobs[number], self.values[number])
                done.add(number)
        return done

    def _tell(self, job: Any, values: Sequence[float]) -> None:
        from smac.runhistory.dataclasses import TrialValue

        self.facade.tell(job, TrialValue(cost=min(values[: round(job.budget)])))


def _never_called(config: Any, seed: int, budget: float) -> float:
    """What SMAC would call if it were not asked and told."""
    raise NotImplementedError


def top_of_one_rung(study: Study, running: Sequence[FrozenTrial], share: float) -> list[int]:
    """Stop at a trial's first rung, once and for all, what is not among the best so far by the values there.
    As in our rule, a rung that measures the bare base is none: nobody is judged there, or by it."""
    known, stopped = study.get_trials(deepcopy=False), list[int]()
    for trial in running:
        rung = _untrained(trial) + 1
        if trial.last_step == rung:
            there = [t for t in known if _untrained(t) < rung and rung in t.intermediate_values]
            values = sorted(t.intermediate_values[rung] for t in there)
            limit = values[max(1, round(share * len(values))) - 1]
            if len(values) > 2 and trial.intermediate_values[rung] > limit:
                stopped.append(trial.number)
    return stopped


def _untrained(trial: FrozenTrial) -> int:
    return int(trial.user_attrs["progress"]["untrained_rung"])


def guarded(study: Study, running: Sequence[FrozenTrial], factor: int = 3) -> list[int]:
    """Stop as our rule does, but not what falls so fast that, if it went on like that, it would be kept."""
    trials = study.get_trials(deepcopy=False)
    losers = RungPruner(1, factor).losers(trials, running)
    best = min(min(t.intermediate_values.values()) for t in trials if t.intermediate_values)
    spared = [t.number for t in running if _extrapolated(t) < best]
    return [number for number in losers if number not in spared]


def _extrapolated(trial: FrozenTrial) -> float:
    """Return the value two rungs on, by the last fall; without one it falls not at all."""
    last, before = (trial.last_step or 0), (trial.last_step or 0) - 1
    values = trial.intermediate_values
    return values[last] ** 3 / values[before] ** 2 if before in values else values[last]


def patient(study: Study, running: Sequence[FrozenTrial], factor: int = 3) -> list[int]:
    """Stop as our rule does, and what was not better for two rungs."""
    losers = list(RungPruner(1, factor).losers(study.get_trials(deepcopy=False), running))
    stale = [t.number for t in running if (t.last_step or 0) - _best_rung(t) >= 2]
    return sorted({*losers, *stale})


def _best_rung(trial: FrozenTrial) -> int:
    values = trial.intermediate_values
    return min(values, key=lambda rung: values[rung])


OURS, FREEZE_THAW = "ours: tpe, first trials, asha", "freeze-thaw, first trials"
ASHA = (1, 2)  # first rung, reduction factor
RULES = {
    "factor 2": Contender(rule=ASHA),
    "factor 3": Contender(rule=(1, 3)),
    "factor 4": Contender(rule=(1, 4)),
    "first rung 2, factor 3": Contender(rule=(2, 3)),
    "first rung 2, factor 2": Contender(rule=(2, 2)),
    "one rung, top quarter": Contender(stop=partial(top_of_one_rung, share=0.25)),
    "one rung, top third": Contender(stop=partial(top_of_one_rung, share=0.34)),
    "one rung, top half": Contender(stop=partial(top_of_one_rung, share=0.5)),
    "factor 3, guard for late crossings": Contender(stop=guarded),
    "factor 2, guard for late crossings": Contender(stop=partial(guarded, factor=2)),
    "factor 3, patience 2": Contender(stop=patient),
    "factor 2, patience 2": Contender(stop=partial(patient, factor=2)),
    "no pruning": Contender(),
}
RIVALS = {
    "tpe, default first, asha (before)": Contender(first=FIRST[:1], rule=ASHA),
    "random, first trials, asha": Contender(sampler="random", rule=ASHA),
    "ours, TPE models after 3 trials": Contender(rule=ASHA, startup=3),
    "tpe, first trials, successive halving": Contender(pruner=lambda k: SuccessiveHalvingPruner(1, 3)),
    "random, asha": Contender(sampler="random", first=(), rule=ASHA),
    "random": Contender(sampler="random", first=()),
    "tpe": Contender(first=()),
    "tpe, median": Contender(first=(), pruner=lambda k: MedianPruner(n_startup_trials=4, n_warmup_steps=1)),
    "tpe, successive halving": Contender(first=(), pruner=lambda k: SuccessiveHalvingPruner(1, 3)),
    "tpe, hyperband": Contender(first=(), pruner=lambda k: HyperbandPruner(1, k, 3)),
    "grid 3x3x2": Contender(sampler="random", first=GRID),
}  # fmt: skip
SLOW = {"gp, first trials, asha": Contender(sampler="gp", rule=ASHA)}
OTHERS = {"Syne Tune's ASHA": ("syne_tune", SyneTuneAsha), "SMAC3's Hyperband": ("smac", SmacHyperband)}


def contenders(*, slow: bool = False) -> dict[str, Any]:
    """Return all contenders that can run here, ours first."""
    there = {name: cls for name, (module, cls) in OTHERS.items() if importlib.util.find_spec(module)}
    rules = {f"rule: {name}": one for name, one in RULES.items() if name != "factor 2"}
    frozen = {FREEZE_THAW: FreezeThawSearch}
    return {OURS: RULES["factor 2"], **RIVALS, **there, **frozen, **rules, **(SLOW if slow else {})}
