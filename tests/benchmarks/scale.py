"""`python -m tests.benchmarks.scale [WORKERS ...]`: 1,000 workers, 100,000 trials, one study, simulated.

First what each query of a worker costs, in CPU time of worker and server, with 4,000 trials running on a
real PostgreSQL. Then the product's `Worker`, ledger and pruning rule over an engine on recorded curves
(`simulated`) and a virtual clock, on which queries wait where the server's cores are busy. Draws are random
and paid as TPE's.
"""

import heapq
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event

from lora_search.database.storage import quieten_optuna
from lora_search.output.tracking import NoTracker
from lora_search.search.pruning import RungPruner
from lora_search.search.sampling import make_sampler
from lora_search.search.trials import progress_after
from lora_search.settings.overlay import trial_settings
from lora_search.settings.space import parse_space
from lora_search.study.budget import NOTE_SECONDS
from lora_search.study.ledger import Ledger
from lora_search.study.study import SUMMARY_PER_TRIAL, SUMMARY_SECONDS, SweepStudy
from lora_search.trial import Measurement, Stop, StudySummary, TrialRun
from lora_search.worker.worker import Worker
from tests.benchmarks.crowd import crowd, others_report
from tests.benchmarks.simulated import Engine, Silent, recorded_task, sweep
from tests.benchmarks.study import SPACE, measurement
from tests.servers import processes_of, real_postgres, sqlalchemy_uri

RUNNING, FINISHED, CALLS, CHANGED = 4_000, 1_000, 15, 100
SIZES = (1, 10, 100, 300, 1_000)
SLOTS, RUNG_SECONDS, TRIALS_EACH, CORES = 4, 60.0, 100, 8
HEARTBEAT_SECONDS = 30.0


@dataclass(frozen=True)
class Price:
    """Of one query: CPU seconds of the worker and of the server, and statements."""

    client: float = 0.0
    server: float = 0.0
    statements: float = 0.0

    def times(self, count: float) -> "Price":
        return Price(self.client * count, self.server * count, self.statements * count)

    def plus(self, other: "Price") -> "Price":
        return Price(
            self.client + other.client, self.server + other.server, self.statements + other.statements
        )


def cpu_seconds(server: Any) -> float:
    """Return the time that all processes of the server have computed, with those that have ended."""
    pids = processes_of(server)
    stats = [Path(f"/proc/{pid}/schedstat") for pid in pids]
    ended = Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[13:15]
    alive = sum(int(stat.read_text().split()[0]) for stat in stats if stat.exists()) / 1e9
    return alive + sum(map(int, ended)) / os.sysconf("SC_CLK_TCK")


def measure_prices() -> dict[str, Price]:
    """Return what a worker's queries cost, by kind: the median of each."""
    with real_postgres() as server, tempfile.TemporaryDirectory() as folder:
        config = replace(sweep(sqlalchemy_uri(server), 1), space=SPACE)
        space, seen = parse_space(config), list[object]()
        study = SweepStudy.open(config, space, {}, {}, Path(folder))
        crowd(study, space, FINISHED, RUNNING)
        study.storage.engine.dispose()
        config.study.n_trials = FINISHED + RUNNING + 1_000
        study = SweepStudy.open(config, space, {}, {}, Path(folder))
        event.listen(study.storage.engine, "before_cursor_execute", lambda *_: seen.append(None))

        def price(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> Price:
            found = []
            for _ in range(CALLS):
                before()
                begin = time.process_time(), cpu_seconds(server), len(seen)
                call()
                end = time.process_time(), cpu_seconds(server), len(seen)
                found.append([after - first for after, first in zip(end, begin, strict=True)])
            return Price(*(statistics.median(column) for column in zip(*found, strict=True)))

        runs: list[TrialRun] = []
        prices = {"claim": price(lambda: runs.extend(study.claim(1)))}
        rung = iter(range(1, 100))
        prices["report"] = price(lambda: report_all(study, runs[:SLOTS], next(rung)))
        study.ledger.read()
        prices["look"] = price(study.ledger.read)
        busy = price(study.ledger.read, lambda: others_report(study, 100 * CHANGED))
        prices["change"] = busy.plus(prices["look"].times(-1)).times(1 / CHANGED)
        prices["beat"] = price(study.trials.beat)
        prices["note"] = price(lambda: study.account._write(is_open=True))
        ends = iter(runs)
        prices["end"] = price(lambda: study.prune(Stop(trial_number=next(ends).number, reason="")))
        study.storage.engine.dispose()
    return prices


def report_all(study: SweepStudy, runs: Sequence[TrialRun], rung: int) -> None:
    study.report([measurement(run, rung) for run in runs])


class Store:
    """The server on the virtual clock: in each second its cores have so much time for queries, whoever comes
    first; what is beyond that waits for the next second."""

    def __init__(self, prices: dict[str, Price], cores: int) -> None:
        self.prices, self.cores, self.taken = prices, cores, defaultdict[int, float](float)
        self.busy = self.statements = 0.0

    def serve(self, now: float, price: Price) -> float:
        """Return when the answer has been read."""
        second = int(now)
        while self.taken[second] >= self.cores:
            second += 1
        self.taken[second] += price.server
        self.busy += price.server
        self.statements += price.statements
        return max(now, second) + price.server + price.client


class Hall:
    """The study that all workers share."""

    def __init__(self, n_trials: int, prices: dict[str, Price], cores: int) -> None:
        self.config, self.n_trials, self.store = (
            sweep("sqlite:///none", n_trials),
            n_trials,
            Store(prices, cores),
        )
        self.space = parse_space(self.config)
        self.sampler = make_sampler(replace(self.config.sampler, name="random"), self.space.distributions, 0)
        pruner = self.config.pruner
        self.ledger = Ledger(self._changes, RungPruner(pruner.first_rung, pruner.reduction_factor))
        self.trials: dict[int, FrozenTrial] = {}  # unfinished
        self.num_drawn = self.version = 0
        self.bests: list[tuple[float, float]] = []  # when, and the lowest perplexity by then
        self._changed: dict[int, FrozenTrial] = {}

    def _changes(self, _: Iterable[int]) -> Iterable[FrozenTrial]:
        changed, self._changed = self._changed, {}
        return changed.values()

    def put(self, trial: FrozenTrial) -> None:
        self.version += 1
        self._changed[trial.number] = self.trials[trial.number] = trial
        if trial.state.is_finished():
            self.ledger.read()
            del self.trials[trial.number]

    def draw(self, worker: str) -> FrozenTrial:
        number, names = self.num_drawn, self.space.distributions
        self.num_drawn += 1
        trial = create_trial(state=TrialState.RUNNING, user_attrs={"worker": worker})
        trial.number = trial._trial_id = number
        self.sampler.before_trial(None, trial)  # type: ignore[arg-type]
        draw = self.sampler.sample_independent
        params = {name: draw(None, trial, name, one) for name, one in names.items()}  # type: ignore[arg-type]
        trial._distributions, trial.params = dict(names), params
        self.put(trial)
        return trial


class VirtualStudy:
    """What `Worker` asks of a study, on one worker's clock."""

    was_silent = False

    def __init__(self, hall: Hall, name: str) -> None:
        self.hall, self.name, self.config = hall, name, hall.config
        self.held: dict[int, int] = {}
        self.trials = SimpleNamespace(put_back_unheld=lambda: None)
        self.now = self.idle = 0.0
        self._version, self._looked = 0, 0.0

    def pay(self, *bill: tuple[str, float]) -> None:
        """Wait until queries have been answered."""
        price = Price()
        for kind, count in bill:
            price = price.plus(self.hall.store.prices[kind].times(count))
        end = self.hall.store.serve(self.now, price)
        self.idle += end - self.now
        self.now = end

    def look(self) -> None:
        """Read what has changed since the last look."""
        self.pay(("look", 1), ("change", min(self.hall.version - self._version, 2 * len(self.hall.trials))))
        self._version = self.hall.version
        self.hall.ledger.read()

    def claim(self, _: int) -> list[TrialRun]:
        if self.hall.num_drawn >= self.hall.n_trials:
            return []
        self.look()
        self.pay(("claim", 1))
        trial = self.hall.draw(self.name)
        settings = trial_settings(self.config, trial.params)
        self.held[trial.number] = settings.num_rungs
        return [TrialRun(number=trial.number, seed=0, settings=settings, folder="")]

    def report(self, measurements: Sequence[Measurement]) -> None:
        if not measurements:
            return
        self.pay(("report", len(measurements) / SLOTS))
        for m in measurements:
            trial = self._copy(m.trial_number)
            trial.intermediate_values = {**trial.intermediate_values, m.rung: m.perplexity}
            trial.user_attrs = {**trial.user_attrs, "progress": progress_after(trial, [m])}
            self.hall.put(trial)
            if not self.hall.bests or m.perplexity < self.hall.bests[-1][1]:
                self.hall.bests.append((self.now, m.perplexity))

    def judge(self) -> list[Stop]:
        self.look()
        standings = self.hall.ledger.standings
        assert standings is not None
        judged = [t for n in self.held if (t := self.hall.trials[n]).last_step]
        return [Stop(trial_number=n, reason=why) for n, why in standings.losers(judged).items()]

    def finish(self, m: Measurement) -> str:
        return self._end(m.trial_number, TrialState.COMPLETE, m.best_perplexity)

    def prune(self, stop: Stop) -> str:
        return self._end(stop.trial_number, TrialState.PRUNED, None)

    def heartbeat(self) -> None:
        """Pay for all heartbeats, notes and looks of the passes since the last event."""
        gap, self._looked = self.now - self._looked, self.now
        pause = SUMMARY_SECONDS + SUMMARY_PER_TRIAL * self.hall.ledger.num_open
        looks = gap / max(pause, RUNG_SECONDS / 100)
        self.pay(("look", looks), ("beat", gap / HEARTBEAT_SECONDS), ("note", gap / NOTE_SECONDS))

    def summary(self) -> StudySummary:
        return self.hall.ledger.summary(self.hall.n_trials)

    def check_failures(self) -> None: ...

    def beyond_budget(self, _: Sequence[int]) -> list[Stop]:
        return []

    def _end(self, number: int, state: TrialState, value: float | None) -> str:
        self.pay(("end", 1))
        trial = self._copy(number)
        trial.state, trial.values = state, None if value is None else [value]
        self.hall.put(trial)
        del self.held[number]
        return state.name

    def _copy(self, number: int) -> FrozenTrial:
        old = self.hall.trials[number]
        return FrozenTrial(
            number=number, state=old.state, value=None, datetime_start=old.datetime_start,
            datetime_complete=None, params=old.params, distributions=old.distributions,
            user_attrs=old.user_attrs, system_attrs={}, intermediate_values=old.intermediate_values,
            trial_id=number,
        )  # fmt: skip


@dataclass
class Crew:
    """One worker of the simulation."""

    study: VirtualStudy
    engine: Engine
    worker: Worker

    def step(self) -> float | None:
        """Take the worker's loop to its next rung; return when that is. None if no trial is left."""
        study, engine = self.study, self.engine
        if engine.seated:
            measurements = engine.advance()
            begin = study.now
            self.worker.keep_alive()
            self.worker.settle(measurements)
            self.worker.show()
        else:
            begin = study.now
        self.worker.admit()
        for one in engine.seated.values():  # what is paid for is not trained in
            one.due += study.now - begin
        return min((one.due for one in engine.seated.values()), default=None)


def simulate(workers: int, n_trials: int, prices: dict[str, Price], cores: int) -> str:
    """Return a row of the table."""
    hall, task = Hall(n_trials, prices, cores), recorded_task()
    crews = [crew(hall, task, number) for number in range(workers)]
    queue = [(number * RUNG_SECONDS / workers, number) for number in range(workers)]
    while queue:
        now, number = heapq.heappop(queue)
        crews[number].study.now = max(now, crews[number].study.now)
        due = crews[number].step()
        if due is not None:
            heapq.heappush(queue, (due, number))
    end = max(one.study.now for one in crews)
    idle = sum(one.study.idle for one in crews) / sum(one.study.now for one in crews)
    goal = 1.01 * task.best()
    best = next((when for when, value in hall.bests if value <= goal), math.inf)
    store = hall.store
    return (
        f"| {workers:,} | {n_trials:,} | {idle:.1%} | {end / 3600:.2f} | {best / 60:.0f} | "
        f"{store.statements / end:,.0f} | {store.busy / end:.2f} of {cores} |\n"
    )


def crew(hall: Hall, task: Any, number: int) -> Crew:
    study = VirtualStudy(hall, f"h:{number}:1")

    def wait(seconds: float) -> None:
        study.now += seconds

    engine = Engine(task, SLOTS, RUNG_SECONDS, now=lambda: study.now, wait=wait)
    worker = Worker(study, engine, NoTracker(), Silent(), lambda: None)  # type: ignore[arg-type]
    return Crew(study, engine, worker)


def main() -> None:
    quieten_optuna()
    sizes = [int(word) for word in sys.argv[1:]] or SIZES
    prices = measure_prices()
    sys.stdout.write("| query | worker's CPU ms | server's CPU ms | statements |\n|---|---|---|---|\n")
    for kind, price in prices.items():
        cells = f"{1000 * price.client:.2f} | {1000 * price.server:.2f} | {price.statements:.1f}"
        sys.stdout.write(f"| {kind} | {cells} |\n")
    heads = ("workers", "trials", "idle", "hours", "minutes to within 1 %", "statements/s", "server's cores")
    sys.stdout.write(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n")
    for workers in sizes:
        sys.stdout.write(simulate(workers, workers * TRIALS_EACH, prices, CORES))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
