"""Another worker strikes between a look and the write that follows it: before each transaction, in turn, of
each operation that changes a trial. A real second worker, with its own connection: nothing is luck."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from lora_search.database.presence import worker_name
from lora_search.search.trials import PAUSED, UNSIGNED, is_held_by
from lora_search.settings.schema import PrunerConfig, SamplerConfig, SweepConfig
from lora_search.study.study import BASE_WIDTH, SweepStudy
from lora_search.trial import Stop, TrialRun
from tests.servers import postgres_url, real_mysql
from tests.study.test_pausing import at
from tests.study.test_study import ONE_POINT, RUNGS, make_config, measure, open_study

GONE = worker_name(os.getpid()) + "9"  # no process of this host: it is taken for dead at once
Act = Callable[[], object]
Arranged = tuple[SweepStudy, SweepStudy, Act]  # a rival, a worker, and what that is about to do


def config_of(folder: Path, storage: str, **changes: object) -> SweepConfig:
    config = make_config(folder, storage=storage, sampler=SamplerConfig(name="random"), **changes)  # type: ignore[arg-type]
    config.study.name = folder.name
    return config


def opened(folder: Path, storage: str, **changes: object) -> tuple[SweepStudy, SweepStudy]:
    """Return a rival, and a worker that it takes for dead."""
    rival, study = (open_study(config_of(folder, storage, **changes), folder) for _ in range(2))
    study.trials.worker = GONE
    return rival, study


def holding(folder: Path, storage: str, **changes: object) -> tuple[SweepStudy, SweepStudy, TrialRun]:
    rival, study = opened(folder, storage, **changes)
    return rival, study, study.claim(1)[0]


def report(folder: Path, storage: str) -> Arranged:
    rival, study, run = holding(folder, storage)
    return rival, study, lambda: study.report([measure(run, 1), measure(run, 2)])


def judge(folder: Path, storage: str) -> Arranged:
    rival, study, run = holding(folder, storage)
    study.report([measure(run, 1)])
    return rival, study, study.judge


def prune(folder: Path, storage: str) -> Arranged:
    rival, study, run = holding(folder, storage)
    return rival, study, lambda: study.prune(Stop(trial_number=run.number, reason="rung 1: too late"))


def pause(folder: Path, storage: str) -> Arranged:
    rival, study, run = holding(folder, storage, pruner=PrunerConfig(resume_paused=True))
    study.report([measure(run, 1)])
    return rival, study, lambda: study.prune(Stop(trial_number=run.number, reason="rung 1: too late"))


def finish(folder: Path, storage: str) -> Arranged:
    rival, study, run = holding(folder, storage)
    return rival, study, lambda: study.finish(measure(run, RUNGS, "finished"))


def fail(folder: Path, storage: str) -> Arranged:
    rival, study, run = holding(folder, storage)
    return rival, study, lambda: study.fail(run.number, "too late")


def note_recovery(folder: Path, storage: str) -> Arranged:
    rival, study, run = holding(folder, storage)
    return rival, study, lambda: study.trials.note(run.number, {"recovery": "damaged"})


def hand_back(folder: Path, storage: str) -> Arranged:
    rival, study, _ = holding(folder, storage)
    return rival, study, lambda: study.hand_back("too late")


def put_back_unheld(folder: Path, storage: str) -> Arranged:
    rival, study, _ = holding(folder, storage)
    study.held.clear()
    return rival, study, study.trials.put_back_unheld


def reclaim(folder: Path, storage: str) -> Arranged:
    rival, study, _ = holding(folder, storage)
    study.held.clear()
    study.trials.worker = worker_name(1)  # another one, that is alive
    return rival, study, study.reclaim_stale


def draw(folder: Path, storage: str) -> Arranged:
    rival, study = opened(folder, storage)
    return rival, study, lambda: study.claim(1)


def refuse(folder: Path, storage: str) -> Arranged:
    """The second trial has the parameters of the first, for there are no others, and is refused."""
    rival, study, run = holding(folder, storage, space=ONE_POINT)
    study.finish(measure(run, RUNGS, "finished"))
    study.study.enqueue_trial({"lora.r": 8})
    return rival, study, lambda: study.claim(1)


def paused(folder: Path, storage: str, num_worse: int) -> tuple[SweepStudy, SweepStudy, list[TrialRun]]:
    """Trials 1 and 2 are paused; with three more that are worse, trial 1 belongs to the top again."""
    rival, study = opened(folder, storage, pruner=PrunerConfig(resume_paused=True))
    runs = study.claim(3 + num_worse)
    study.report([at(run, 1, 10.0 + run.number) for run in runs])
    for run in runs[1:3]:
        study.prune(Stop(trial_number=run.number, reason="rung 1: paused"))
    return rival, study, runs


def promote(folder: Path, storage: str) -> Arranged:
    rival, study, _ = paused(folder, storage, num_worse=3)
    return rival, study, lambda: study.claim(1)


def thaw(folder: Path, storage: str) -> Arranged:
    """The rule chooses the one trial that may go on: the other has ended, and no new one may begin."""
    rival, study = opened(folder, storage, pruner=PrunerConfig(name="freeze_thaw"), n_trials=2)
    runs = study.claim(2)
    study.report([at(runs[0], 1, 9.0), at(runs[1], 1, 8.0), at(runs[1], 2, 7.0)])
    study.prune(Stop(trial_number=1, reason="rung 2: paused"))
    return rival, study, lambda: study.claim(1)


def settle(folder: Path, storage: str) -> Arranged:
    rival, study, runs = paused(folder, storage, num_worse=0)
    study.finish(at(runs[0], RUNGS, 9.0, is_last=True))
    study.config.study.n_trials = 3
    return rival, study, lambda: study.claim(1)


def take(rival: SweepStudy) -> None:
    rival.reclaim_stale()
    rival.claim(1)


def take_and_end(rival: SweepStudy) -> None:
    rival.reclaim_stale()
    for run in rival.claim(1):
        rival.report([measure(run, RUNGS, "finished")])
        rival.finish(measure(run, RUNGS, "finished"))


def put_back(rival: SweepStudy) -> None:
    rival.reclaim_stale()


def take_up(rival: SweepStudy) -> None:
    """Promote a paused trial, and train it."""
    assert rival.pauses is not None
    rival.pauses._move(1, TrialState.WAITING, {PAUSED: False, **UNSIGNED})
    rival.claim(1)


slow = pytest.mark.slow
HELD = [report, judge, prune, pause, finish, fail, note_recovery, hand_back, put_back_unheld, reclaim]
NEW = [draw, refuse, promote]  # the rival may as well draw a trial of its own
CASES = [
    *(pytest.param(arrange, take_and_end) for arrange in HELD),
    *(pytest.param(arrange, take_up) for arrange in (settle, thaw)),
    *(pytest.param(arrange, strike, marks=slow) for arrange in HELD for strike in (take, put_back)),
    *(pytest.param(arrange, strike, marks=slow) for arrange in NEW for strike in (take, take_and_end)),
]


def name(part: Any) -> str:
    return str(part.__name__)


@contextmanager
def struck_before(study: SweepStudy, transaction: int, strike: Act) -> Iterator[list[int]]:
    """Let the rival act when this worker is about to begin so many transactions; the list says how many it
    began."""
    begun: list[int] = [0]

    def on_checkout(*_: object) -> None:
        begun[0] += 1
        if begun[0] == transaction:
            strike()

    event.listen(study.storage.engine, "checkout", on_checkout)  # of the connection, before a lock is taken
    yield begun
    event.remove(study.storage.engine, "checkout", on_checkout)


def rivals_trials(rival: SweepStudy, strike: object) -> dict[int, FrozenTrial]:
    """Return what the rival has made of trials: this must stay as it is."""
    trials = rival.study.get_trials()
    if strike is put_back:
        return {t.number: t for t in trials if t.state == TrialState.WAITING}
    return {t.number: t for t in trials if t.user_attrs.get("worker") == rival.worker}


def race(folder: Path, storage: str, arrange: Any, strike: Any) -> int:
    """Strike before each transaction in turn; return how many of the strikes hit a trial."""
    hits, transaction, begun = 0, 1, 1
    while transaction <= begun:
        place = folder / f"{arrange.__name__}-{strike.__name__}-{transaction}"
        rival, study, act = arrange(place, storage)
        rival.config.study.heartbeat_seconds = 0  # it takes whoever has not signed yet for dead
        theirs: dict[int, FrozenTrial] = {}

        def strikes(rival: SweepStudy = rival, theirs: dict[int, FrozenTrial] = theirs) -> None:
            strike(rival)
            theirs |= rivals_trials(rival, strike)

        with struck_before(study, transaction, strikes) as count:
            act()
        begun = count[0]
        assert theirs.items() <= {t.number: t for t in rival.study.get_trials()}.items()
        study.trials.drop_lost()
        mine = [t.number for t in rival.study.get_trials() if is_held_by(t, study.worker)]
        assert set(study.held) <= set(mine)
        robbed = [number for number, trial in theirs.items() if trial.state == TrialState.RUNNING]
        assert all((place / "trials" / str(n) / "checkpoint").exists() for n in robbed if arrange is settle)
        hits += bool(theirs) if arrange in NEW else bool({0, 1} & theirs.keys())
        transaction += 1
        for each in (study, rival):
            each.storage.engine.dispose()
    return hits


@pytest.mark.parametrize(("arrange", "strike"), CASES, ids=name)
def test_a_write_that_comes_too_late_changes_nothing(tmp_path: Path, arrange: Any, strike: Any) -> None:
    hits = race(tmp_path, f"sqlite:///{tmp_path}/study.db", arrange, strike)

    assert hits >= 1


def test_a_surplus_draw_that_was_put_back_before_it_was_signed_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rival, study = opened(tmp_path, f"sqlite:///{tmp_path}/study.db", n_trials=1)
    rival.config.study.heartbeat_seconds = 0  # it takes whoever has not signed yet for dead
    ask = study.draws._ask

    def slowly() -> object:
        (run,) = rival.claim(1)
        drawn = ask()
        rival.reclaim_stale()
        assert rival.study.get_trials()[1].state == TrialState.WAITING
        rival.report([measure(run, RUNGS, "finished")])
        rival.finish(measure(run, RUNGS, "finished"))
        return drawn

    monkeypatch.setattr(study.draws, "_ask", slowly)

    assert study.claim(1) == []
    assert [t.state for t in rival.study.get_trials()] == [TrialState.COMPLETE, TrialState.FAIL]
    assert rival.is_finished


@pytest.mark.parametrize("transaction", [1, 2, 3])
def test_two_starts_at_once_put_the_first_trials_in_line_once(tmp_path: Path, transaction: int) -> None:
    config = config_of(tmp_path, f"sqlite:///{tmp_path}/study.db")
    config.study.first_trial_is_default = False
    rival, study = (open_study(config, tmp_path) for _ in range(2))
    config.study.first_trial_is_default = True
    study.study.set_user_attr(BASE_WIDTH, "4096")

    with struck_before(study, transaction, rival._enqueue_first) as count:
        study._enqueue_first()
    rival._enqueue_first()

    assert count == [3]
    rates = [t.system_attrs["fixed_params"]["optim.lr"] for t in study.study.get_trials()]
    assert rates == [2e-4, 8.6e-4, 9.5e-5]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    with postgres_url() as url:
        yield url


@pytest.fixture(scope="module")
def mysql() -> Iterator[str]:
    with real_mysql() as server:
        yield server.url


@slow
@pytest.mark.parametrize(("arrange", "strike"), CASES, ids=name)
@pytest.mark.parametrize("server", ["postgresql", pytest.param("mysql", marks=pytest.mark.mysql)])
def test_a_write_that_comes_too_late_changes_nothing_on_a_server(
    tmp_path: Path, request: pytest.FixtureRequest, server: str, arrange: Any, strike: Any
) -> None:
    hits = race(tmp_path, request.getfixturevalue(server), arrange, strike)

    assert hits >= 1
