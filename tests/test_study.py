import math
import os
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from lora_search.config import PrunerConfig, SamplerConfig, StudyConfig, SweepConfig, TrainConfig
from lora_search.errors import FingerprintError, LoraSearchError, StudyError
from lora_search.pruning import RungPruner
from lora_search.space import parse_space
from lora_search.storage import worker_name
from lora_search.study import SweepStudy
from lora_search.trial import EndReason, Measurement, TrialRun

RUNGS = 4
SPACE = {"lora": {"r": "choice(8, 16, 32)"}, "optim": {"lr": "tag(log, interval(1e-5, 1e-2))"}}


def make_config(tmp_path: Path, *, n_trials: int = 8, **changes: object) -> SweepConfig:
    storage = f"sqlite:///{tmp_path}/study.db"
    study = StudyConfig(name="s", n_trials=n_trials, storage=storage)
    config = SweepConfig(study=study, train=TrainConfig(epochs=1, evals_per_epoch=RUNGS), space=SPACE)
    return replace(config, **changes)  # type: ignore[arg-type]


def open_study(config: SweepConfig, tmp_path: Path, fingerprint: dict[str, str] | None = None) -> SweepStudy:
    return SweepStudy.open(config, parse_space(config), fingerprint or {"a": "1"}, {"made": "here"}, tmp_path)


def measure(run: TrialRun, rung: int, ended: EndReason | None = None) -> Measurement:
    perplexity = 10 + abs(math.log10(run.settings.lr) + 3) - 0.1 * rung
    return Measurement(
        trial_number=run.number, rung=rung, examples_seen=rung, train_tokens=rung, train_seconds=1.0,
        tokens_per_second=1.0, validation_loss=math.log(perplexity), perplexity=perplexity, best_rung=rung,
        best_perplexity=perplexity, steps=(), ended=ended, detail="",
    )  # fmt: skip


def simulate(study: SweepStudy, slots: int = 4, stop_after: Callable[[], bool] = lambda: False) -> None:
    """A worker without an engine: every tick each held trial moves one rung."""
    running: dict[int, tuple[TrialRun, int]] = {}
    while not stop_after():
        for run in study.claim(slots - len(running)):
            done = study.storage.get_trial(study.held[run.number]._trial_id).last_step or 0
            running[run.number] = (run, done)
        if not running:
            return
        ticks = [
            measure(run, rung + 1, "finished" if rung + 1 == RUNGS else None)
            for run, rung in running.values()
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


@pytest.mark.parametrize(
    "pruner", ["asha", "hyperband", "median", "percentile", "patient", "wilcoxon", "none"]
)
@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc", "cmaes"])
def test_every_sampler_and_pruner_ends_with_exactly_n_trials(
    tmp_path: Path, sampler: str, pruner: str
) -> None:
    config = make_config(tmp_path, sampler=SamplerConfig(name=sampler), pruner=PrunerConfig(name=pruner))

    study = open_study(config, tmp_path)
    simulate(study)

    assert study.is_finished
    assert study.summary().finished == 8
    assert study.summary().complete >= 1


def test_a_grid_is_tried_once_and_then_exhausted(tmp_path: Path) -> None:
    space = {"lora": {"r": "choice(8, 16, 32)"}, "train": {"batch_size": "choice(4, 8)"}}
    config = make_config(tmp_path, n_trials=50, sampler=SamplerConfig(name="grid"), space=space)

    study = open_study(config, tmp_path)
    simulate(study)

    params = [tuple(sorted(row.params.items())) for row in study.rows()]
    assert len(params) == len(set(params)) == 6
    assert study.exhausted
    assert study.is_finished


def test_the_first_trial_is_the_known_good_default(tmp_path: Path) -> None:
    assert open_study(make_config(tmp_path), tmp_path).claim(1)[0].settings.lr == 2e-4


def test_the_total_holds_over_restarts_and_can_be_raised(tmp_path: Path) -> None:
    for n_trials, expected in ((4, 4), (4, 4), (7, 7)):
        study = open_study(make_config(tmp_path, n_trials=n_trials), tmp_path)
        simulate(study)
        assert study.summary().finished == expected


def test_a_trial_handed_back_is_continued_with_its_history(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    run = study.claim(1)[0]
    study.report([measure(run, 1)])

    study.hand_back("interrupted")
    again = open_study(make_config(tmp_path), tmp_path)
    claimed = again.claim(1)[0]

    assert (claimed.number, claimed.settings, claimed.seed) == (run.number, run.settings, run.seed)
    assert list(again.rows()[0].perplexities) == [1]


def test_the_trials_of_a_dead_worker_are_found_at_once(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    run = study.claim(1)[0]
    host = worker_name(os.getpid()).partition(":")[0]
    trial_id = study.study.get_trials()[0]._trial_id
    study.storage.set_trial_user_attr(trial_id, "worker", f"{host}:999999:1")

    again = open_study(make_config(tmp_path), tmp_path)

    assert again.claim(1)[0].number == run.number


def test_a_living_worker_keeps_its_trials(tmp_path: Path) -> None:
    open_study(make_config(tmp_path), tmp_path).claim(2)

    other = open_study(make_config(tmp_path), tmp_path)

    assert [run.number for run in other.claim(8)] == [2, 3, 4, 5, 6, 7]


def test_other_settings_under_the_same_name_are_refused_by_key(tmp_path: Path) -> None:
    open_study(make_config(tmp_path), tmp_path, {"seed": "0", "data_hash": "x"})

    with pytest.raises(FingerprintError, match=r"(?s)seed: 0 -> 1.*new study.name") as caught:
        open_study(make_config(tmp_path), tmp_path, {"seed": "1", "data_hash": "x"})

    assert caught.value.exit_code == 2


def test_a_diverged_trial_fails_and_too_many_of_them_end_the_sweep(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    for run in study.claim(5):
        nan = replace(measure(run, 1, "diverged"), perplexity=math.nan, detail="loss not finite")
        study.report([nan])
        assert study.finish(nan) == "FAIL"

    assert study.summary().finished == 0
    with pytest.raises(StudyError, match="5 trials failed in a row, the last one, trial 4: diverged"):
        study.check_failures()


@pytest.mark.parametrize(
    ("storage", "rule"),
    [
        ("nosuchdb://u:hunter2@h/db", "must be a SQL URL of a known kind"),
        ("postgresql+psycopg://u:hunter2@127.0.0.1:1/db", "cannot be used: .*Connection refused"),
    ],
)
def test_a_wrong_storage_is_one_message_without_the_password(tmp_path: Path, storage: str, rule: str) -> None:
    config = make_config(tmp_path, study=StudyConfig(name="s", storage=storage))

    with pytest.raises(LoraSearchError, match=rule) as caught:
        open_study(config, tmp_path)

    assert "hunter2" not in str(caught.value)


def test_sqlite_is_in_wal_mode(tmp_path: Path) -> None:
    open_study(make_config(tmp_path), tmp_path)

    with sqlite3.connect(tmp_path / "study.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_survival_at_a_rung_does_not_depend_on_order() -> None:
    survivors = np.zeros(9)
    for seed in range(200):
        values = np.random.default_rng(seed).permutation(9)
        study = optuna.create_study(pruner=RungPruner(1, 3))
        trials = [study.ask() for _ in values]
        for trial, value in zip(trials, values, strict=True):
            trial.report(float(value), 1)
        kept = [not trial.should_prune() for trial in trials]
        assert sorted(values[kept]) == [0, 1, 2]
        survivors += kept

    assert survivors.min() > 40
    assert survivors.max() < 95
