"""Many workers on one study, with a simulated engine: real servers, SQLite with the dashboard open."""

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine, event

from lora_search.database.storage import open_storage
from lora_search.output.conclusion import conclude
from lora_search.results.record import StudyRecord
from lora_search.search.trials import FINISHED
from lora_search.settings.schema import PrunerConfig, SamplerConfig, StudyConfig, SweepConfig, TrainConfig
from lora_search.study.view import StudyView
from lora_search.worker.worker import work
from tests.processes import FORKS
from tests.servers import postgres_url, real_mysql
from tests.study.test_study import RUNGS, measure, open_study
from tests.worker.test_worker import CurveEngine, RecordingTracker, quiet

SPACE = {"lora": {"r": "choice(8, 16, 32)"}, "optim": {"lr": "range(0.0001, 0.0201, 0.0001)"}}  # 600 points
SECONDS = 900  # until a test counts as hanging: a machine may be loaded
pytestmark = pytest.mark.slow


def make_config(storage: str, n_trials: int) -> SweepConfig:
    return SweepConfig(
        study=StudyConfig(
            name="s", n_trials=n_trials, storage=storage, heartbeat_seconds=5, max_retries=1000
        ),
        train=TrainConfig(epochs=1, evals_per_epoch=RUNGS),
        sampler=SamplerConfig(name="random"),
        pruner=PrunerConfig(name="asha"),
        space=SPACE,
    )


def work_to_the_end(folder: Path, storage: str, n_trials: int) -> None:
    study = open_study(make_config(storage, n_trials), folder)
    work(study, CurveEngine(4), RecordingTracker(), quiet()[0])


@contextlib.contextmanager
def started(count: int, *arguments: object) -> Iterator[list[BaseProcess]]:
    """Run so many workers; leave none behind."""
    workers = [start_worker(*arguments) for _ in range(count)]  # type: ignore[arg-type]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def start_worker(folder: Path, storage: str, n_trials: int) -> BaseProcess:
    process = FORKS.Process(target=work_to_the_end, args=(folder, storage, n_trials))
    process.start()
    return process


def trials_of(storage: str) -> list[FrozenTrial]:
    study = optuna.load_study(study_name="s", storage=open_storage(StudyConfig(name="s", storage=storage)))
    return study.get_trials(deepcopy=False)


def view_of(storage: str, n_trials: int) -> StudyView:
    """Return the study, as soon as a worker has made it."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            return StudyView(StudyConfig(name="s", n_trials=n_trials, storage=storage))
        time.sleep(0.1)
    raise AssertionError("no worker made the study")


def kill_some(workers: list[BaseProcess], kills: int, folder: Path, view: StudyView, storage: str) -> None:
    """Kill a worker taken at random whenever a few more trials have ended, and start another in its place."""
    draw, n_trials, deadline = random.Random(0), view.config.n_trials, time.monotonic() + SECONDS
    for kill in range(kills):
        while view.summary().finished < kill * n_trials * 0.9 / kills:
            assert time.monotonic() < deadline, view.summary()
            time.sleep(0.02)
        place = draw.randrange(len(workers))
        workers[place].kill()
        workers[place].join(SECONDS)
        assert workers[place].exitcode == -signal.SIGKILL
        workers[place] = start_worker(folder, storage, n_trials)


@pytest.fixture
def postgresql() -> Iterator[str]:
    with postgres_url() as url:
        yield url


@pytest.fixture
def mysql() -> Iterator[str]:
    with real_mysql() as server:
        yield server.url


@pytest.mark.parametrize("server", ["postgresql", pytest.param("mysql", marks=pytest.mark.mysql)])
def test_eight_workers_on_one_server_lose_and_double_nothing_through_sixty_kills(
    tmp_path: Path, request: pytest.FixtureRequest, server: str
) -> None:
    storage = request.getfixturevalue(server)
    n_trials = 500

    with started(8, tmp_path, storage, n_trials) as workers:
        kill_some(workers, 60, tmp_path, view_of(storage, n_trials), storage)
        for worker in workers:
            worker.join(SECONDS)

    assert [worker.exitcode for worker in workers] == [0] * 8
    trials = trials_of(storage)
    finished = [t for t in trials if t.state in FINISHED]
    assert len(finished) == n_trials
    assert len({str(t.params) for t in finished}) == n_trials
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    refused = [t.user_attrs["reason"].split()[0] for t in trials if t.state == TrialState.FAIL]
    assert set(refused) <= {"duplicate", "surplus:"}, Counter(refused)
    assert all(sorted(t.intermediate_values) == [*range(1, len(t.intermediate_values) + 1)] for t in finished)
    ends = {(t.state, len(t.intermediate_values) == RUNGS) for t in finished}
    assert ends == {(TrialState.COMPLETE, True), (TrialState.PRUNED, False)}


def test_four_workers_share_sqlite_while_the_dashboard_is_asked_for_pages(tmp_path: Path) -> None:
    n_trials, storage = 80, f"sqlite:///{tmp_path}/study.db"

    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(started(4, tmp_path, storage, n_trials))
        view_of(storage, n_trials)  # two programs that make the same tables at once get in each other's way
        url = stack.enter_context(dashboard(storage))
        pages = []
        while any(worker.is_alive() for worker in workers):
            pages += [get(f"{url}/api/studies"), get(f"{url}/api/studies/1?after=0"), get(f"{url}/dashboard")]
        last = json.loads(get(f"{url}/api/studies/1?after=0"))

    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(pages) >= 9
    assert Counter(trial["state"] for trial in last["trials"])["Running"] == 0
    trials = trials_of(storage)
    finished = [str(t.params) for t in trials if t.state in FINISHED]
    assert len(finished) == len(set(finished)) == n_trials
    assert len({t.user_attrs["worker"] for t in trials}) > 1


def test_invocations_that_end_at_the_same_moment_conclude_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = open_study(make_config(f"sqlite:///{tmp_path}/study.db", 1), tmp_path / "runs/s")
    run = study.claim(1)[0]
    last = measure(run, RUNGS, "finished")
    study.report([last])
    study.finish(last)
    adapter = Path(run.folder) / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    record = StudyRecord(study.rows(), {**study.attributes(), "base_perplexity": "20.0"}, study.folder)

    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(conclude, record, study.config, quiet()[0]) for _ in range(8)]

    assert [end.result() for end in ends] == [None] * 8
    assert (tmp_path / "runs/s/best/adapter/adapter_config.json").read_text() == "{}"
    assert "Leaderboard" in (tmp_path / "runs/s/report.html").read_text()
    assert list(tmp_path.glob("runs/s/*.new")) == []


def die_at_statement(number: int, storage: str) -> None:
    """Make the database and be killed after so many SQL statements."""
    count = itertools.count(1)

    def after(*_: object) -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "after_cursor_execute", after)
    open_storage(StudyConfig(storage=storage))


@pytest.mark.parametrize("statement", [10, 25, 40])
def test_a_kill_while_the_database_is_made_leaves_no_half_made_one(tmp_path: Path, statement: int) -> None:
    storage, whole = f"sqlite:///{tmp_path}/study.db", tmp_path / "whole.db"
    process = FORKS.Process(target=die_at_statement, args=(statement, storage))
    process.start()
    process.join(SECONDS)
    for path in (tmp_path / "study.db", whole):
        open_storage(StudyConfig(storage=f"sqlite:///{path}"))

    assert process.exitcode == -signal.SIGKILL
    assert schema_of(tmp_path / "study.db") == schema_of(whole)
    assert any("UNIQUE INDEX" in statement for statement in schema_of(whole))


def schema_of(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return sorted(sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql NOTNULL"))


@contextlib.contextmanager
def dashboard(storage: str) -> Iterator[str]:
    """Run the real optuna-dashboard on the database; yield where it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), "--host", "127.0.0.1", "--port", port]
    process = subprocess.Popen([*command, storage], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with contextlib.suppress(urllib.error.URLError):
            get(f"{url}/dashboard")
            return
        time.sleep(0.1)
    raise AssertionError("the dashboard did not start")


def get(url: str) -> str:
    """Return the page; HTTPError where the dashboard fails."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())
