"""`python -m tests.benchmarks.study`: what the study itself costs per trial, as a Markdown table.

A worker with four slots and no engine: every tick each held trial reports one rung and is judged. Measured
when the study already has 10, 1,000 and 10,000 trials, on SQLite and on a PostgreSQL server of its own.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

from lora_search.database.storage import quieten_optuna
from lora_search.settings.schema import StudyConfig, SweepConfig, TrainConfig
from lora_search.settings.space import Space, parse_space
from lora_search.study.study import SweepStudy
from lora_search.trial import Measurement, TrialRun
from tests.servers import postgres_url

SIZES = (10, 1_000, 10_000)
SLOTS, RUNGS, TRIALS = 4, 8, 24
SPACE = {
    "lora": {"r": "choice(8, 16, 32)"},
    "train": {"batch_size": "choice(2, 4, 8)"},
    "optim": {"lr": "tag(log, interval(1e-5, 1e-2))"},
}
COPIED = {  # Optuna's tables, and what is copied of them besides the trial
    "trial_params": "param_name, param_value, distribution_json",
    "trial_values": "objective, value, value_type",
    "trial_user_attributes": "key, value_json",
    "trial_system_attributes": "key, value_json",
    "trial_intermediate_values": "step, intermediate_value, intermediate_value_type",
}
CALLS = ("claim", "report", "judge", "end", "heartbeat", "summary")
Timed = Callable[[str], AbstractContextManager[None]]


def perplexity(lr: float, number: int, rung: int) -> float:
    """Return a value that falls with every rung and is best at lr 1e-3; the number stands for noise."""
    noise = np.random.default_rng((number, rung)).normal(0, 0.02)
    return float(10 + (np.log10(lr) + 3) ** 2 + 3 * np.exp(-rung / 2) + noise)


def past_trial(space: Space, number: int) -> FrozenTrial:
    """Return a trial as a finished sweep leaves it: most were pruned early, one in nine is COMPLETE."""
    rng = np.random.default_rng(number)
    params = {
        "lora.r": int(rng.choice([8, 16, 32])),
        "optim.lr": float(10 ** rng.uniform(-5, -2)),
        "train.batch_size": int(rng.choice([2, 4, 8])),
    }
    rungs = int(rng.choice([1, 3, RUNGS], p=[6 / 9, 2 / 9, 1 / 9]))
    values = {rung: perplexity(params["optim.lr"], number, rung) for rung in range(1, rungs + 1)}
    is_complete = rungs == RUNGS
    return create_trial(
        state=TrialState.COMPLETE if is_complete else TrialState.PRUNED,
        value=min(values.values()) if is_complete else values[rungs],
        params=params,
        distributions=space.distributions,
        intermediate_values=values,
        user_attrs={"reason": "", "settings": "{}", "worker": "past:1:1"},
    )


def measurement(run: TrialRun, rung: int) -> Measurement:
    value = perplexity(run.settings.lr, run.number, rung)
    return Measurement(
        trial_number=run.number, rung=rung, examples_seen=10 * rung, train_tokens=100 * rung,
        train_seconds=1.0, tokens_per_second=1.0, validation_loss=float(np.log(value)), perplexity=value,
        best_rung=rung, best_perplexity=value, steps=(), ended="finished" if rung == RUNGS else None,
    )  # fmt: skip


class Clock:
    """Times calls by kind, at their median: a busy machine makes some of them slow."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {call: [] for call in CALLS}

    @contextmanager
    def on(self, call: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.samples[call].append(time.perf_counter() - start)

    def ms(self, call: str) -> float:
        return 1000 * statistics.median(self.samples[call])

    @property
    def ms_per_trial(self) -> float:
        """Return the cost of a trial of four rungs in four slots: claim, end, a quarter of four ticks."""
        return sum(self.ms(call) for call in CALLS)


def tick(study: SweepStudy, held: dict[int, tuple[TrialRun, int]], on: Timed) -> bool:
    """Fill the slots, let each trial in them reach a rung, end what is to end, each by itself; return False
    if no trial was left to claim."""
    while len(held) < SLOTS:
        with on("claim"):
            runs = study.claim(1)
        if not runs:
            return False
        held[runs[0].number] = (runs[0], 0)
    held |= {number: (run, rung + 1) for number, (run, rung) in held.items()}
    news = [measurement(run, rung) for run, rung in held.values()]
    with on("report"):
        study.report(news)
    for m in news:
        if m.ended:
            with on("end"):
                study.finish(m)
            del held[m.trial_number]
    with on("judge"):
        stops = study.judge()
    for stop in stops:
        with on("end"):
            study.prune(stop)
        del held[stop.trial_number]
    with on("heartbeat"):
        study.heartbeat()
    with on("summary"):
        study.summary()
    return True


def work(study: SweepStudy) -> Clock:
    """Run the study until its last trial is claimed, as the worker does."""
    clock, held = Clock(), dict[int, tuple[TrialRun, int]]()
    while tick(study, held, clock.on):
        pass
    return clock


def multiply(study: SweepStudy, have: int, size: int, first: int = 0) -> None:
    """Copy ``have`` trials from ``first`` on, and their copies, until there are ``size``: in SQL, for adding
    each is slow."""
    while have < size:
        count = min(have, size - have)
        which = f"trials.number >= {first} AND trials.number < {first + count}"
        with study.storage.engine.begin() as connection:
            run = connection.exec_driver_sql
            run(
                "INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete) SELECT "
                f"number + {have}, study_id, state, datetime_start, datetime_complete FROM trials "
                f"WHERE {which} ORDER BY number"
            )
            for table, columns in COPIED.items():
                run(
                    f"INSERT INTO {table} (trial_id, {columns}) SELECT copy.trial_id, {columns} FROM {table} "
                    f"JOIN trials ON trials.trial_id = {table}.trial_id AND {which} "
                    f"JOIN trials AS copy ON copy.number = trials.number + {have}"
                )
        have += count


def fill(study: SweepStudy, space: Space, size: int) -> None:
    """Give the study so many finished trials."""
    added = min(size, 100)
    study.study.add_trials([past_trial(space, number) for number in range(added)])
    multiply(study, added, size)


def measure(folder: Path, storage: str, size: int) -> Clock:
    """Return what the study costs that has so many trials when its worker starts. One study a database."""
    settings = StudyConfig(name="s", n_trials=1, storage=storage, first_trial_is_default=False)
    config = SweepConfig(study=settings, train=TrainConfig(epochs=1, evals_per_epoch=RUNGS), space=SPACE)
    space = parse_space(config)
    study = SweepStudy.open(config, space, {}, {}, folder)
    fill(study, space, size)
    study.storage.engine.dispose()
    settings.n_trials = size + TRIALS
    study = SweepStudy.open(config, space, {}, {}, folder)
    assert study.summary().finished == size
    clock = work(study)
    study.storage.engine.dispose()
    return clock


def write_table(name: str, clocks: dict[int, Clock]) -> None:
    """Print rows of the Markdown table."""
    for size, clock in clocks.items():
        cells = [f"{clock.ms(call):.1f}" for call in CALLS]
        ratio = clock.ms_per_trial / clocks[SIZES[0]].ms_per_trial
        sys.stdout.write(
            f"| {name} | {size:,} | {' | '.join(cells)} | {clock.ms_per_trial:.1f} | {ratio:.2f}x |\n"
        )
        sys.stdout.flush()


def main() -> None:
    quieten_optuna()
    heads = f"| storage | trials before | {' | '.join(CALLS)} | a trial of four rungs | against {SIZES[0]} |"
    sys.stdout.write("Milliseconds per call; report, judge and summary serve a tick of four trials:\n\n")
    sys.stdout.write(f"{heads}\n{'---'.join('|' * (len(CALLS) + 5))}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table("SQLite", {n: measure(folder, f"sqlite:///{folder}/{n}.db", n) for n in SIZES})
        clocks = {}
        for n in SIZES:
            with postgres_url() as url:
                clocks[n] = measure(folder, url, n)
        write_table("PostgreSQL", clocks)


if __name__ == "__main__":
    main()
