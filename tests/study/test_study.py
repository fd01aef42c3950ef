"""The study against a simulated worker with known curves: real SQLite files, real processes, no engine."""

import math
import multiprocessing
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from lora_search.database.presence import worker_name
from lora_search.errors import ConfigError, FingerprintError, LoraSearchError, StudyError
from lora_search.settings.schema import (
    OptimConfig,
    PrunerConfig,
    SamplerConfig,
    StudyConfig,
    SweepConfig,
    TrainConfig,
)
from lora_search.settings.space import parse_space
from lora_search.study.study import SweepStudy
from lora_search.trial import EndReason, Measurement, Stop, TrialRun
from tests.servers import postgres_url

RUNGS = 4
SPACE = {"lora": {"r": "choice(8, 16, 32)"}, "optim": {"lr": "tag(log, interval(1e-5, 1e-2))"}}
SIX_POINTS = {"lora": {"r": "choice(8, 16, 32)"}, "train": {"batch_size": "choice(4, 8)"}}
SPAWN = multiprocessing.get_context("spawn")


def make_config(tmp_path: Path, *, n_trials: int = 8, storage: str = "", **changes: object) -> SweepConfig:
    storage = storage or f"sqlite:///{tmp_path}/study.db"
    study = StudyConfig(name="s", n_trials=n_trials, storage=storage)
    config = SweepConfig(study=study, train=TrainConfig(epochs=1, evals_per_epoch=RUNGS), space=SPACE)
    return replace(config, **changes)  # type: ignore[arg-type]


def open_study(config: SweepConfig, tmp_path: Path, fingerprint: dict[str, str] | None = None) -> SweepStudy:
    return SweepStudy.open(config, parse_space(config), fingerprint or {"a": "1"}, {"made": "here"}, tmp_path)


def measure(run: TrialRun, rung: int, ended: EndReason | None = None) -> Measurement:
    perplexity = 10 + abs(math.log10(run.settings.lr) + 3) - 0.1 * rung
    return Measurement(
        trial_number=run.number, rung=rung, examples_seen=10 * rung, train_tokens=100 * rung,
        train_seconds=1.5, tokens_per_second=1.0, validation_loss=math.log(perplexity),
        perplexity=perplexity, best_rung=rung, best_perplexity=perplexity, steps=(), ended=ended, detail="",
    )  # fmt: skip


def diverge(study: SweepStudy, run: TrialRun) -> str:
    nan = replace(
        measure(run, 1, "diverged"), perplexity=math.nan, best_perplexity=math.nan, detail="loss not finite"
    )
    study.report([nan])
    return study.finish(nan)


def simulate(
    study: SweepStudy,
    slots: int = 4,
    measure: Callable[..., Measurement] = measure,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """A worker without an engine, driven as `worker.work` does: every tick each held trial moves one rung."""
    running: dict[int, tuple[TrialRun, int]] = {}
    while not study.budget.is_over:
        for run in study.claim(slots - len(running)):
            running[run.number] = (run, max(rungs_of(study, run.number), default=0))
        if not running:
            return
        tick()
        ticks = [
            measure(run, done + 1, "finished" if done + 1 == RUNGS else None)
            for run, done in running.values()
        ]
        study.report(ticks)
        for m in ticks:
            running[m.trial_number] = (running[m.trial_number][0], m.rung)
            if m.ended:
                study.finish(m)
                del running[m.trial_number]
        for stop in study.judge():
            study.prune(stop)
            del running[stop.trial_number]
        for stop in study.beyond_budget(list(running)):
            study.put_back(stop)
            del running[stop.trial_number]


def rungs_of(study: SweepStudy, number: int) -> list[int]:
    return next(list(row.perplexities) for row in study.rows() if row.number == number)


def states(study: SweepStudy) -> Counter[str]:
    return Counter(row.state for row in study.rows())


def sign_as(study: SweepStudy, number: int, worker: str) -> None:
    """Make the trial another worker's."""
    study.storage.set_trial_user_attr(study.table.id_of(number), "worker", worker)


def work_until_done(folder: Path, storage: str, n_trials: int, gate: Barrier) -> None:
    """A worker process of its own. It trains once all workers have trials."""
    gates = [gate]

    def measure_together(run: TrialRun, rung: int, ended: EndReason | None) -> Measurement:
        while gates:
            gates.pop().wait(100)
        return measure(run, rung, ended)

    study = open_study(make_config(folder, storage=storage, n_trials=n_trials), folder)
    simulate(study, measure=measure_together)


def work_until_killed(folder: Path) -> None:
    study = open_study(make_config(folder), folder)
    study.report([measure(run, 1) for run in study.claim(2)])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [
        *((sampler, "asha") for sampler in ("tpe", "gp", "random", "grid", "qmc", "cmaes")),
        *(
            ("random", pruner)
            for pruner in ("freeze_thaw", "hyperband", "median", "percentile", "patient", "wilcoxon", "none")
        ),
        ("tpe", "hyperband"),
    ],
)
def test_every_sampler_and_pruner_ends_with_exactly_n_trials(
    tmp_path: Path, sampler: str, pruner: str
) -> None:
    space = {"lora": {"r": "choice(8, 16, 32)"}, "optim": {"lr": "range(0.001, 0.01, 0.001)"}}
    config = make_config(
        tmp_path,
        sampler=SamplerConfig(name=sampler, n_startup_trials=3),
        pruner=PrunerConfig(name=pruner),
        space=space,
    )

    study = open_study(config, tmp_path)
    simulate(study)

    assert study.is_finished
    assert study.summary().finished == 8
    assert study.summary().complete >= 1
    assert states(study).keys() <= {"COMPLETE", "PRUNED"}


@pytest.mark.parametrize(
    "sampler", ["tpe", *(pytest.param(s, marks=pytest.mark.slow) for s in ("random", "qmc", "cmaes"))]
)
def test_a_continued_sweep_tries_what_an_uninterrupted_one_does(tmp_path: Path, sampler: str) -> None:
    params = []
    for name, totals in (("whole", [7]), ("halves", [4, 7])):
        folder = tmp_path / name
        for n_trials in totals:
            config = make_config(
                folder, n_trials=n_trials, sampler=SamplerConfig(name=sampler, n_startup_trials=3)
            )
            study = open_study(config, folder)
            simulate(study, slots=1)
        params.append([row.params for row in study.rows()])

    assert params[0] == params[1]
    assert len({str(p) for p in params[0]}) == 7


@pytest.mark.parametrize("sampler", ["grid", "tpe", "random"])
def test_a_countable_space_is_tried_once_and_then_exhausted(tmp_path: Path, sampler: str) -> None:
    config = make_config(tmp_path, n_trials=50, sampler=SamplerConfig(name=sampler), space=SIX_POINTS)

    study = open_study(config, tmp_path)
    simulate(study)

    assert len({str(row.params) for row in study.rows()}) == len(study.rows()) == 6
    assert study.is_finished
    assert study.draws.exhausted
    assert study.attributes()["exhausted"] == "all 6 combinations of the space have been tried"
    assert study.summary().failed == 0


def test_the_first_trial_is_the_known_good_default_unless_switched_off(tmp_path: Path) -> None:
    with_default = make_config(tmp_path)
    storage = f"sqlite:///{tmp_path}/other.db"
    without = make_config(
        tmp_path, study=StudyConfig(name="s", storage=storage, first_trial_is_default=False)
    )

    assert open_study(with_default, tmp_path).claim(1)[0].settings.lr == 2e-4
    assert open_study(without, tmp_path).claim(1)[0].settings.lr != 2e-4


def test_a_claimed_trial_has_its_own_seed_and_folder(tmp_path: Path) -> None:
    first, second = open_study(make_config(tmp_path), tmp_path).claim(2)

    assert first.folder == str(tmp_path.resolve() / "trials" / "0")
    assert (second.number, second.folder) == (1, str(tmp_path.resolve() / "trials" / "1"))
    assert first.seed != second.seed


def test_the_total_holds_over_restarts_and_can_be_raised(tmp_path: Path) -> None:
    for n_trials, expected in ((4, 4), (4, 4), (7, 7), (5, 7)):
        study = open_study(make_config(tmp_path, n_trials=n_trials), tmp_path)
        simulate(study)
        assert study.summary().finished == expected
        assert study.is_finished


ONE_POINT = {"lora": {"r": "choice(8)"}}


def draw_by_hand(study: SweepStudy) -> None:
    """Be another worker that ends drawing and signs."""
    trial = optuna.Trial(study.study, study.table.id_of(0))
    trial.suggest_categorical("lora.r", (8,))
    trial.set_user_attr("worker", "elsewhere:1:1")


def test_a_trial_waits_for_the_parameters_of_those_before_it_and_never_doubles_them(tmp_path: Path) -> None:
    config = make_config(tmp_path, space=ONE_POINT, sampler=SamplerConfig(name="random"))
    config.study.first_trial_is_default = False
    config.study.heartbeat_seconds = 600  # an unsigned trial older than that is a dead worker's
    first, second = open_study(config, tmp_path), open_study(config, tmp_path)
    first.storage.create_new_trial(first.study._study_id)

    with ThreadPoolExecutor(1) as pool:
        claim = pool.submit(second.claim, 1)
        while not any("worker" in t.user_attrs for t in first.study.get_trials()):
            assert not claim.done()
        draw_by_hand(first)

    assert claim.result() == []
    assert [t.user_attrs.get("reason") for t in first.study.get_trials()] == [None, "duplicate of trial 0"]


def test_a_trial_that_never_began_is_not_taken_up_beside_a_later_one_like_it(tmp_path: Path) -> None:
    config = make_config(tmp_path, space=ONE_POINT, sampler=SamplerConfig(name="random"))
    config.study.first_trial_is_default, config.study.heartbeat_seconds = False, 1
    study = open_study(config, tmp_path)
    study.storage.create_new_trial(study.study._study_id)  # its worker is killed before it signs

    later = study.claim(1)
    study.reclaim_stale()
    again = study.claim(1)

    assert [run.number for run in later] == [1]
    assert again == []
    assert study.study.get_trials()[0].user_attrs["reason"] == "duplicate of trial 1"


def test_a_study_says_what_n_trials_means_for_it(tmp_path: Path) -> None:
    said = []
    for n_trials in (4, 4, 2):
        study = open_study(make_config(tmp_path, n_trials=n_trials), tmp_path)
        said.append(study.standing)
        simulate(study)

    assert said[0] == "0 of 4 trials done"
    assert said[1] == "4 of 4 trials done; raise study.n_trials to continue"
    assert said[2].startswith(
        "4 of 2 trials done: study.n_trials is lower than the number of finished trials"
    )
    assert study.is_finished


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc", "cmaes"])
def test_a_sweep_goes_on_after_a_range_was_widened(tmp_path: Path, sampler: str) -> None:
    wide = {"lora": {"r": "choice(8,16,32)"}, "optim": {"lr": "tag(log, interval(1e-6, 1e-1))"}}
    for space, n_trials in ((SPACE, 5), (wide, 9)):
        config = make_config(
            tmp_path, n_trials=n_trials, space=space, sampler=SamplerConfig(name=sampler, n_startup_trials=2)
        )
        study = open_study(config, tmp_path)
        simulate(study)

    assert study.changes == ["space.optim.lr: 1e-05 to 0.01, log -> 1e-06 to 0.1, log"]
    assert study.summary().finished == 9
    with pytest.raises(FingerprintError, match="none taken out"):
        open_study(replace(config, space={**wide, "lora": {"r": "choice(8,16,64)"}}), tmp_path)


def test_a_waiting_trial_is_taken_by_one_worker_only(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_trials=16, sampler=SamplerConfig(name="random"))
    first = open_study(config, tmp_path)
    first.claim(16)
    first.hand_back("interrupted")
    workers = [open_study(config, tmp_path) for _ in range(3)]

    with ThreadPoolExecutor(3) as pool:
        claims = list(pool.map(lambda worker: [run.number for run in worker.claim(16)], workers))

    assert sorted(number for claim in claims for number in claim) == list(range(16))


def test_trials_that_run_elsewhere_count_against_the_total(tmp_path: Path) -> None:
    assert len(open_study(make_config(tmp_path), tmp_path).claim(5)) == 5

    other = open_study(make_config(tmp_path), tmp_path)

    assert [run.number for run in other.claim(8)] == [5, 6, 7]
    assert not other.is_finished


def test_a_failed_trial_makes_room_for_another(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path, n_trials=2), tmp_path)
    for run in study.claim(8):
        study.fail(run.number, "out of memory")

    simulate(study)

    assert states(study)["FAIL"] == 2
    assert study.summary().finished == 2
    assert study.rows()[0].reason == "out of memory"


def test_a_trial_handed_back_is_continued_with_its_history(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    run = study.claim(1)[0]
    study.report([measure(run, 1)])

    study.hand_back("interrupted")
    between = study.rows()[0]
    again = open_study(make_config(tmp_path), tmp_path)
    claimed = again.claim(1)[0]

    assert (between.state, between.reason) == ("WAITING", "interrupted")
    assert claimed == replace(run, perplexities={1: measure(run, 1).perplexity})
    assert (rungs_of(again, run.number), again.rows()[0].reason) == ([1], "")


def test_a_rung_that_is_measured_again_keeps_its_first_value(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    run = study.claim(1)[0]

    study.report([measure(run, 1)])
    study.report([replace(measure(run, 1), perplexity=99.0)])
    study.report([replace(measure(run, 2), perplexity=math.nan)])

    assert study.rows()[0].perplexities == {1: measure(run, 1).perplexity}
    assert study.rows()[0].train_seconds == 4.5


def test_a_killed_workers_trials_are_found_at_once_and_go_on(tmp_path: Path) -> None:
    process = SPAWN.Process(target=work_until_killed, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

    study = open_study(make_config(tmp_path), tmp_path)
    found = [(row.state, row.reason, list(row.perplexities)) for row in study.rows()]
    simulate(study)

    assert found == [("WAITING", "its worker died", [1])] * 2
    assert states(study).keys() <= {"COMPLETE", "PRUNED"}
    assert study.summary().finished == 8


def test_a_trial_whose_worker_dies_again_and_again_fails_with_the_reason(tmp_path: Path) -> None:
    for _ in range(4):
        study = open_study(make_config(tmp_path, n_trials=1), tmp_path)
        assert [run.number for run in study.claim(1)] == [0]
        sign_as(study, 0, worker_name(os.getpid()) + "9")

    study = open_study(make_config(tmp_path, n_trials=1), tmp_path)

    assert (study.rows()[0].state, study.rows()[0].reason) == (
        "FAIL",
        "its worker died 4 times at the same rung",
    )
    assert [run.number for run in study.claim(1)] == [1]


def test_a_trial_that_comes_on_between_deaths_is_never_given_up(tmp_path: Path) -> None:
    config = make_config(tmp_path, study=StudyConfig(
        name="s", n_trials=1, storage=f"sqlite:///{tmp_path}/study.db", max_retries=1
    ))  # fmt: skip
    for rung in (1, 2, 3):
        study = open_study(config, tmp_path)
        run = study.claim(1)[0]
        study.report([measure(run, rung)])
        sign_as(study, 0, worker_name(os.getpid()) + "9")

    study = open_study(config, tmp_path)

    assert (study.rows()[0].state, rungs_of(study, 0)) == ("WAITING", [1, 2, 3])


def test_a_worker_on_another_host_is_dead_only_when_its_heartbeat_is(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    first, second = study.claim(2)
    for run in (first, second):
        sign_as(study, run.number, "elsewhere:1:1")
    with sqlite3.connect(tmp_path / "study.db") as connection:  # the first has been silent for an hour
        connection.execute(
            "UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour') WHERE trial_id = 1"
        )
    connection.close()

    other = open_study(make_config(tmp_path), tmp_path)

    assert [row.state for row in other.rows()] == ["WAITING", "RUNNING"]
    assert other.claim(1)[0] == first


def test_a_trial_taken_over_by_another_worker_is_let_go(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    run, kept = study.claim(2)
    study.report([measure(run, 1), measure(kept, 1)])
    sign_as(study, run.number, "elsewhere:1:1")

    study.report([measure(run, 2), measure(kept, 2)])
    stops = study.judge()
    study.prune(stops[0])

    assert stops == [Stop(trial_number=run.number, reason="taken over by another worker")]
    assert list(study.held) == [kept.number]
    assert (states(study)["RUNNING"], rungs_of(study, run.number)) == (2, [1])


def test_an_end_told_too_late_changes_nothing(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    run = study.claim(1)[0]
    other = open_study(make_config(tmp_path), tmp_path)
    other.held[run.number] = study.held[run.number]
    other.fail(run.number, "ended first")

    assert study.finish(measure(run, 4, "finished")) == "FAIL"
    assert study.rows()[0].reason == "ended first"


def test_other_settings_under_the_same_name_are_refused_by_key(tmp_path: Path) -> None:
    open_study(make_config(tmp_path), tmp_path, {"seed": "0", "data_hash": "x"})

    with pytest.raises(FingerprintError, match=r"(?s)seed: 0 -> 1.*new study.name") as caught:
        open_study(make_config(tmp_path), tmp_path, {"seed": "1", "data_hash": "x"})

    assert caught.value.exit_code == 2
    assert "data_hash" not in str(caught.value)


def test_a_diverged_trial_is_pruned_and_too_many_of_them_end_the_sweep(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path, n_trials=20), tmp_path)
    good, *bad = study.claim(6)
    ends = [diverge(study, run) for run in bad[:4]]
    study.check_failures()
    ends.append(diverge(study, bad[4]))

    with pytest.raises(
        StudyError, match="5 trials failed in a row, the last one, trial 5: diverged: loss not finite"
    ):
        study.check_failures()

    assert ends == ["PRUNED"] * 5
    assert {row.reason for row in study.rows()[1:]} == {"diverged: loss not finite"}
    study.finish(measure(good, 4, "finished"))
    study.check_failures()


def test_a_value_that_is_not_finite_is_never_complete(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    run = study.claim(1)[0]
    last = replace(measure(run, 4, "finished"), perplexity=math.inf, best_perplexity=math.inf)
    study.report([last])

    assert study.finish(last) == "PRUNED"
    assert study.summary().best_perplexity is None


def test_rows_and_summary_tell_what_happened(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    first, second, _ = study.claim(3)
    study.report([measure(first, 4, "finished"), measure(second, 1)])
    study.finish(measure(first, 4, "finished"))
    study.prune(Stop(trial_number=second.number, reason="rung 1: not among the best"))

    rows, attributes = SweepStudy.read(make_config(tmp_path).study)
    summary = study.summary()

    assert [row.state for row in rows] == ["COMPLETE", "PRUNED", "RUNNING"]
    assert rows[0].params == {"lora.r": 16, "optim.lr": 2e-4}
    assert (rows[0].best_rung, rows[0].examples_seen, rows[0].train_tokens) == (4, 40, 400)
    assert (rows[1].reason, rows[1].perplexity) == (
        "rung 1: not among the best",
        measure(second, 1).perplexity,
    )
    assert (summary.complete, summary.pruned, summary.running, summary.finished) == (1, 1, 1, 2)
    assert (summary.best_number, summary.best_perplexity) == (0, measure(first, 4).perplexity)
    assert attributes["made"] == "here"
    assert study.study.metric_names == ["validation perplexity"]


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("nosuchdb://u:hunter2@h/db", "must be a SQL URL of a known kind"),
        ("mysql+nodriver://u:hunter2@h/db", "must be a SQL URL of a known kind"),
        ("oracle://u:hunter2@h/db", "needs a database driver"),
        ("postgresql+psycopg://u:hun@ter2@h/db", "must percent-encode special characters"),
        ("postgresql+psycopg://u:hunter2@127.0.0.1:1/db", "cannot be used: connection failed"),
        ("postgresql+psycopg://127.0.0.1:1/db?user=u&password=hunter2", "cannot be used: connection failed"),
        ("sqlite:///{folder}", "must be a file, got"),
        ("sqlite:///{folder}/text.db", "must be an SQLite database .file is not a database"),
        ("sqlite:///{folder}/text.db/sub/study.db", "must be in a writable folder .*Not a directory"),
    ],
)
def test_a_wrong_storage_is_one_message_without_the_password(
    tmp_path: Path, storage: str, message: str
) -> None:
    (tmp_path / "text.db").write_text("this is no database\n" * 100)
    config = make_config(tmp_path, storage=storage.format(folder=tmp_path))

    with pytest.raises(LoraSearchError, match=f"study.storage: .*{message}") as caught:
        open_study(config, tmp_path)

    assert "hunter2" not in str(caught.value)
    assert "ter2" not in str(caught.value)


def test_reading_a_study_that_is_not_there_makes_no_database(tmp_path: Path) -> None:
    config = make_config(tmp_path)

    with pytest.raises(ConfigError, match="study.storage: must be a database that exists"):
        SweepStudy.read(config.study)
    assert list(tmp_path.iterdir()) == []

    open_study(config, tmp_path)
    with pytest.raises(ConfigError, match="study.name: must be a study in study.storage, got 'other'"):
        SweepStudy.read(replace(config.study, name="other"))


def test_sqlite_is_in_wal_mode(tmp_path: Path) -> None:
    open_study(make_config(tmp_path / "new" / "folder"), tmp_path)

    with sqlite3.connect(tmp_path / "new" / "folder" / "study.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def run_workers(folder: Path, storage: str, count: int, n_trials: int) -> Sequence[int | None]:
    arguments = (folder, storage, n_trials, SPAWN.Barrier(count))
    workers = [SPAWN.Process(target=work_until_done, args=arguments) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    return [worker.exitcode for worker in workers]


def assert_shared_fairly(study: SweepStudy, n_trials: int) -> None:
    assert study.summary().finished == n_trials
    assert states(study).keys() <= {"COMPLETE", "PRUNED"}
    assert len({str(row.params) for row in study.rows()}) == n_trials


def test_workers_that_start_at_once_share_one_new_study_and_its_total(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"

    exit_codes = run_workers(tmp_path, storage, count=2, n_trials=8)

    assert exit_codes == [0, 0]
    study = open_study(make_config(tmp_path, n_trials=8), tmp_path)
    assert_shared_fairly(study, 8)
    workers = {
        t.user_attrs["worker"]
        for t in study.study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    }
    assert len(workers) == 2
    enqueued = [t.number for t in study.study.get_trials() if "fixed_params" in t.system_attrs]
    assert enqueued == [0]  # the default, once


@pytest.mark.slow
def test_workers_share_a_study_on_a_real_postgresql_and_store_no_password(tmp_path: Path) -> None:
    with postgres_url() as uri:
        exit_codes = run_workers(tmp_path, uri, count=3, n_trials=16)
        study = open_study(make_config(tmp_path, storage=uri, n_trials=16), tmp_path)

        assert exit_codes == [0, 0, 0]
        assert_shared_fairly(study, 16)
        stored = [study.attributes(), *((t.user_attrs, t.system_attrs) for t in study.study.get_trials())]
        assert "hunter2" in uri
        assert "hunter2" not in str(stored)
        study.storage.engine.dispose()


def test_a_worker_does_not_leave_while_a_trial_waits_that_another_has_just_handed_back(
    tmp_path: Path,
) -> None:
    other, study = (open_study(make_config(tmp_path, n_trials=1), tmp_path) for _ in range(2))
    other.claim(1)
    claimed = study.claim(1)  # nothing: the only trial runs elsewhere

    other.hand_back("interrupted")

    assert (claimed, study.num_running_elsewhere()) == ([], 1)
    assert [run.number for run in study.claim(1)] == [0]
    assert study.num_running_elsewhere() == 0


def test_a_trial_that_is_claimed_anew_does_not_bear_its_dead_workers_signature(tmp_path: Path) -> None:
    first, second, third = (open_study(make_config(tmp_path, n_trials=1), tmp_path) for _ in range(3))
    first.claim(1)
    sign_as(first, 0, worker_name(os.getpid()).rpartition(":")[0] + ":1")  # a process that started at 1
    assert second.reclaim_stale() == 1

    drawn = second.study.ask(second.space.distributions)  # and is slow to sign it

    assert drawn.number == 0
    assert third.reclaim_stale() == 0
    assert third.study.get_trials()[0].state == TrialState.RUNNING


def test_a_trial_whose_worker_died_after_its_last_rung_is_not_pruned_when_it_is_taken_up(
    tmp_path: Path,
) -> None:
    first = open_study(make_config(tmp_path), tmp_path)
    runs = first.claim(5)
    worst = max(runs, key=lambda run: abs(math.log10(run.settings.lr) + 3))
    for rung in range(1, RUNGS + 1):
        first.report([measure(run, rung) for run in runs])
    first.hand_back("its worker is killed before it says that they are finished")

    again = open_study(make_config(tmp_path), tmp_path)
    again.claim(5)

    assert worst.number in again.held
    assert again.judge() == []


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "cmaes"])
def test_a_trial_whose_worker_was_killed_while_it_drew_gets_the_parameters_that_it_would_have_got(
    tmp_path: Path, sampler: str
) -> None:
    configs = [make_config(tmp_path / name, sampler=SamplerConfig(name=sampler)) for name in "ab"]
    whole, study = (open_study(config, tmp_path) for config in configs)
    expected, _ = whole.claim(3)[2], study.claim(2)
    name, distribution = next(iter(parse_space(configs[0]).distributions.items()))
    drawn = {name: whole.study.get_trials()[2].params[name]}
    partly = create_trial(state=TrialState.RUNNING, params=drawn, distributions={name: distribution})
    partly.datetime_start = datetime.now() - timedelta(hours=1)
    study.storage.create_new_trial(study.study._study_id, template_trial=partly)

    study.reclaim_stale()
    (run,) = study.claim(1)

    assert run.number == 2
    assert run.settings == expected.settings


@pytest.mark.parametrize(("warmup_ratio", "stopped"), [(0.05, []), (0.0, [2])])
@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_trial_is_judged_only_after_a_step_with_a_learning_rate(
    tmp_path: Path, pruner: str, warmup_ratio: float, stopped: list[int]
) -> None:
    """Warm-up begins at 0: a trial whose first rung comes after one step has measured the bare base."""
    config = make_config(
        tmp_path,
        pruner=PrunerConfig(name=pruner, n_startup_trials=0),
        optim=OptimConfig(warmup_ratio=warmup_ratio),
        space={"train": {"gradient_accumulation_steps": "choice(1, 2)"}, **SPACE},
    )
    config.study.first_trial_is_default = False
    study = open_study(config, tmp_path)
    for steps, lr in ((1, 1e-3), (1, 1.1e-3), (2, 1e-5)):  # one step is of 8 or 16 examples, a rung of 10
        study.study.enqueue_trial({"train.gradient_accumulation_steps": steps, "optim.lr": lr, "lora.r": 8})
    done, *others = study.claim(3)
    study.report([measure(done, rung) for rung in range(1, RUNGS + 1)])
    study.finish(measure(done, RUNGS, "finished"))

    study.report([measure(run, 1) for run in others])
    at_rung_1 = [stop.trial_number for stop in study.judge()]
    for rung in (2, 3):
        study.report([measure(run, rung) for run in others])

    assert [number for number in at_rung_1 if number == 2] == stopped
    assert 2 in [stop.trial_number for stop in study.judge()]
