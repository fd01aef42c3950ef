"""`python -m tests.benchmarks.crowd [RUNNING,... [FINISHED,...]]`: what one worker pays for the study while
thousands of other trials run, on a PostgreSQL server of its own, as a Markdown table.

CPU time of the worker's process, and SQL statements, of a claim and of a tick: four trials report a rung,
the worker judges, sends heartbeats and sums the study up. Before each tick one in a hundred of the other
trials has reported too. The other trials are written by bulk SQL in the rows that Optuna writes, by another
process: of opening, the memory is what a fresh worker takes at its peak, and what it keeps.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from optuna.trial import TrialState, create_trial
from sqlalchemy import event

from lora_search.database.storage import quieten_optuna
from lora_search.search.trials import PROGRESS
from lora_search.settings.schema import StudyConfig, SweepConfig, TrainConfig
from lora_search.settings.space import Space, parse_space
from lora_search.study.study import SweepStudy
from lora_search.trial import TrialRun
from tests.benchmarks.study import RUNGS, SPACE, fill, multiply, past_trial, tick
from tests.servers import real_postgres, sqlalchemy_uri

RUNNING, FINISHED = (40, 400, 4_000), (1_000, 10_000, 95_000)  # study.n_trials is at most 100,000
TICKS, SEED = 7, 40  # ticks of one worker; running trials that are added one by one, and copied
CALLS = ("open", "claim", "report", "judge", "heartbeat", "summary", "end")
SPAWN = multiprocessing.get_context("spawn")
SELDOM = ("heartbeat", "summary")  # most calls do nothing: what counts is one that is due
SETTINGS = '{"epochs": 1.0, "evals_per_epoch": 8, "warmup_ratio": 0.03, "batch_size": 8}'


class Cost:
    """CPU milliseconds and statements of calls by kind, at their medians; of SELDOM ones, at their most."""

    def __init__(self) -> None:
        self.samples: dict[str, list[tuple[float, int]]] = {call: [] for call in CALLS}
        self.peak_mib = self.kept_mib = 0.0  # of opening
        self._statements = 0

    def count(self, *_: object) -> None:
        self._statements += 1

    @contextmanager
    def of_opening(self) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak begins anew
        before = memory_mib("VmRSS")
        with self.of("open"):
            yield
        self.peak_mib, self.kept_mib = (memory_mib(key) - before for key in ("VmHWM", "VmRSS"))

    @contextmanager
    def of(self, call: str) -> Iterator[None]:
        begin, before = time.process_time(), self._statements
        yield
        self.samples[call].append((1000 * (time.process_time() - begin), self._statements - before))

    def ms(self, call: str) -> float:
        return self._typical(call, [ms for ms, _ in self.samples[call]])

    def statements(self, call: str) -> float:
        return self._typical(call, [count for _, count in self.samples[call]])

    def _typical(self, call: str, values: Sequence[float]) -> float:
        return max(values) if call in SELDOM else statistics.median(values or [0.0])


def memory_mib(key: str) -> float:
    """Return what the kernel says of this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) / 1024


def crowd(study: SweepStudy, space: Space, finished: int, running: int) -> None:
    """Give the study finished trials, and running ones of workers on other hosts at their second rung."""
    fill(study, space, finished)
    for number in range(SEED):
        past = past_trial(space, finished + number)
        progress = {"best_rung": 2, "examples_seen": 20, "train_tokens": 200, "train_seconds": 2.0}
        attributes = {"worker": "elsewhere:1:1", "settings": SETTINGS, "reason": ""}
        study.study.add_trial(
            create_trial(
                state=TrialState.RUNNING, params=past.params, distributions=past.distributions,
                intermediate_values={1: 15.0 + number / SEED, 2: 14.0 + number / SEED}, user_attrs=attributes,
                system_attrs={PROGRESS: progress},
            )
        )  # fmt: skip
    multiply(study, SEED, running, first=finished)
    with study.storage.engine.begin() as connection:  # no two trials are the same
        connection.exec_driver_sql(
            "UPDATE trial_params SET param_value = LEAST(0.01, GREATEST(1e-5, "
            "param_value * (0.5 + random()))) "
            "WHERE param_name = 'optim.lr'"
        )
        connection.exec_driver_sql(
            "INSERT INTO trial_heartbeats (trial_id, heartbeat) SELECT trial_id, now() + interval '1 day' "
            "FROM trials WHERE state = 'RUNNING'"
        )
    with study.storage.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("ANALYZE")


def others_report(study: SweepStudy, running: int) -> None:
    """Let one in a hundred of the others reach its next rung."""
    with study.storage.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO trial_intermediate_values "
            "(trial_id, step, intermediate_value, intermediate_value_type) "
            "SELECT trial_id, max(step) + 1, min(intermediate_value) - 0.1, 'FINITE' "
            "FROM trial_intermediate_values JOIN trials USING (trial_id) "
            "JOIN trial_user_attributes USING (trial_id) "
            "WHERE state = 'RUNNING' AND key = 'worker' AND value_json = '\"elsewhere:1:1\"' "
            f"GROUP BY trial_id HAVING max(step) < 7 ORDER BY random() LIMIT {max(1, running // 100)}"
        )


def opened(storage: str, n_trials: int, folder: Path) -> SweepStudy:
    settings = StudyConfig(name="s", n_trials=n_trials, storage=storage, first_trial_is_default=False)
    config = SweepConfig(study=settings, train=TrainConfig(epochs=1, evals_per_epoch=RUNGS), space=SPACE)
    return SweepStudy.open(config, parse_space(config), {}, {}, folder)


def prepare(storage: str, running: int, finished: int, folder: Path) -> None:
    study = opened(storage, 1, folder)
    crowd(study, study.space, finished, running)


def join(storage: str, running: int, finished: int, folder: Path, told: "SPAWN.Queue[Cost]") -> None:  # type: ignore[name-defined]
    """Tell what a worker pays that joins the study."""
    quieten_optuna()
    cost, held = Cost(), dict[int, tuple[TrialRun, int]]()
    with cost.of_opening():
        study = opened(storage, finished + running + 1_000, folder)
    assert study.summary().finished == finished
    event.listen(study.storage.engine, "before_cursor_execute", cost.count)
    for _ in range(TICKS):
        others_report(study, running)
        tick(study, held, cost.of)
    told.put(cost)


def measure(folder: Path, storage: str, running: int, finished: int) -> Cost:
    """Return what a worker pays that joins a study of this size. One study a database."""
    told: SPAWN.Queue[Cost] = SPAWN.Queue()  # type: ignore[name-defined]
    for target, more in ((prepare, ()), (join, (told,))):
        process = SPAWN.Process(target=target, args=(storage, running, finished, folder, *more))
        process.start()
        process.join()
        assert process.exitcode == 0
    return told.get()


def row(cost: Cost, running: int, finished: int) -> str:
    tick_ms = sum(cost.ms(call) for call in ("report", "judge", "heartbeat", "summary"))
    tick_sql = sum(cost.statements(call) for call in ("report", "judge", "heartbeat", "summary"))
    cells = [f"{cost.ms(c):.1f} / {cost.statements(c):.0f}" for c in CALLS[1:]]
    whole = f"{tick_ms:.0f} / {tick_sql:.0f}"
    opening = f"{cost.ms('open') / 1000:.2f} s, {cost.peak_mib:.0f} / {cost.kept_mib:.0f} MiB"
    return f"| {running:,} | {finished:,} | {opening} | {' | '.join(cells)} | {whole} |\n"


def sizes(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    quieten_optuna()
    running = sizes(sys.argv[1]) if len(sys.argv) > 1 else RUNNING
    finished = sizes(sys.argv[2]) if len(sys.argv) > 2 else FINISHED
    sys.stdout.write("CPU milliseconds / SQL statements; a tick is report, judge, heartbeat and summary:\n\n")
    sys.stdout.write(f"| running | finished | {' | '.join(CALLS)} | tick |\n{'|---' * (len(CALLS) + 3)}|\n")
    for many in finished:
        for busy in running:
            with real_postgres() as server, tempfile.TemporaryDirectory() as folder:
                cost = measure(Path(folder), sqlalchemy_uri(server), busy, many)
            sys.stdout.write(row(cost, busy, many))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
