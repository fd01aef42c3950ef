"""Trials that are stopped and taken up again, in a real study; the engine is simulated."""

import os
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState

from lora_search.errors import ConfigError
from lora_search.search.trials import PAUSED
from lora_search.settings.schema import PrunerConfig, SamplerConfig, StudyConfig, SweepConfig
from lora_search.study.study import SweepStudy
from lora_search.trial import EndReason, Measurement, Stop, TrialRun
from tests.commands import run_sweep
from tests.study.test_study import RUNGS, SPAWN, make_config, measure, open_study, simulate, states

GIB = 2**30
PRUNERS = ("asha_resume", "none")


def pausing_config(folder: Path, *, n_trials: int = 6, keep_bytes: int = GIB) -> SweepConfig:
    config = make_config(folder, pruner=PrunerConfig(reduction_factor=3, resume_paused=True))
    study = replace(config.study, n_trials=n_trials, keep_gib=keep_bytes / GIB)
    return replace(config, study=study)


def at(run: TrialRun, rung: int, perplexity: float, *, is_last: bool = False) -> Measurement:
    """Return a measurement, with the checkpoint of 100 bytes that an engine leaves behind at a rung."""
    folder = Path(run.folder) / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").write_bytes(b"x" * 100)
    ended = "finished" if is_last else None
    return replace(measure(run, rung, ended), perplexity=perplexity, best_perplexity=perplexity)


def measure_later_worse(run: TrialRun, rung: int, ended: EndReason | None = None) -> Measurement:
    """The simulated engine of a sweep whose first trials are its best, so that some are stopped too early."""
    return at(run, rung, 10.0 + run.number - 0.1 * rung, is_last=ended is not None)


def has_checkpoint(run: TrialRun) -> bool:
    return (Path(run.folder) / "checkpoint").exists()


def pause_two(folder: Path, **settings: int) -> tuple[SweepStudy, list[TrialRun]]:
    """Three trials at the first rung: 0 leads, 1 and 2 are paused."""
    study = open_study(pausing_config(folder, **settings), folder)
    runs = study.claim(3)
    study.report([at(run, 1, 10.0 + run.number) for run in runs])
    ends = [study.prune(stop) for stop in study.judge()]
    assert ends == ["PRUNED", "PRUNED"]
    return study, runs


def lift_one(study: SweepStudy) -> None:
    """Three more trials at the first rung, all bad: two of six may go on now, so trial 1 belongs to them."""
    study.report([at(run, 1, 50.0 + run.number) for run in study.claim(3)])
    for stop in study.judge():
        study.prune(stop)


def kill_after_pausing(folder: Path) -> None:
    study, _ = pause_two(folder)
    lift_one(study)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_paused_trial_counts_and_shows_as_a_pruned_one(tmp_path: Path) -> None:
    study, runs = pause_two(tmp_path)

    assert [row.state for row in study.rows()] == ["RUNNING", "PRUNED", "PRUNED"]
    assert [row.state for row in SweepStudy.read(study.config.study)[0]] == ["RUNNING", "PRUNED", "PRUNED"]
    assert study.rows()[1].reason.startswith("rung 1: perplexity 11.0000 is not among the best 1 of 3")
    assert (study.summary().finished, study.summary().running) == (2, 1)
    assert [has_checkpoint(run) for run in runs] == [True, True, True]


def test_a_paused_trial_is_taken_up_again_when_it_belongs_to_the_top_and_is_counted_once(
    tmp_path: Path,
) -> None:
    study, runs = pause_two(tmp_path, n_trials=7)
    lift_one(study)

    again, new = study.claim(2)

    assert again == replace(runs[1], perplexities={1: 11.0})  # what it had measured before
    assert new.number == 6
    assert study.summary().finished == 4
    study.report([at(again, RUNGS, 5.0, is_last=True)])
    assert study.finish(at(again, RUNGS, 5.0, is_last=True)) == "COMPLETE"
    row = study.rows()[1]
    assert (row.state, row.reason, list(row.perplexities)) == ("COMPLETE", "", [1, RUNGS])


def test_a_trial_that_stays_behind_is_not_taken_up(tmp_path: Path) -> None:
    study, _ = pause_two(tmp_path)

    assert [run.number for run in study.claim(1)] == [3]


def test_at_the_end_nothing_is_left_paused_and_no_checkpoint_is_kept(tmp_path: Path) -> None:
    study, runs = pause_two(tmp_path, n_trials=3)
    study.report([at(runs[0], RUNGS, 9.0, is_last=True)])
    study.finish(at(runs[0], RUNGS, 9.0, is_last=True))
    was_finished = study.is_finished

    claimed = study.claim(3)

    assert (was_finished, claimed, study.is_finished) == (False, [], True)
    told = [t.state for t in study.study.get_trials()]
    assert told == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert not any(has_checkpoint(run) for run in runs)


def test_whole_sweeps_end_with_exactly_n_trials_and_some_are_resumed(tmp_path: Path) -> None:
    config = replace(pausing_config(tmp_path, n_trials=12), sampler=SamplerConfig(name="random"))
    study = open_study(config, tmp_path)

    simulate(study, slots=3, measure=measure_later_worse)

    assert study.is_finished
    assert states(study).keys() == {"COMPLETE", "PRUNED"}
    assert study.summary().finished == len(study.rows()) == 12
    resumed = [t.number for t in study.study.get_trials() if t.user_attrs.get(PAUSED) is False]
    assert 1 in resumed  # it was stopped beside trial 0 and is better than all that came later


def test_beyond_the_disk_budget_the_worst_are_out_for_good(tmp_path: Path) -> None:
    study, runs = pause_two(tmp_path, keep_bytes=150)

    told = [t.state for t in study.study.get_trials()]

    assert told == [TrialState.RUNNING, TrialState.RUNNING, TrialState.PRUNED]
    assert [has_checkpoint(run) for run in runs] == [True, True, False]


def test_a_paused_trial_survives_its_workers_death(tmp_path: Path) -> None:
    process = SPAWN.Process(target=kill_after_pausing, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL

    study = open_study(pausing_config(tmp_path, n_trials=6), tmp_path)
    found = [row.state for row in study.rows()]
    claimed = [run.number for run in study.claim(2)]

    assert found == ["WAITING", "PRUNED", "PRUNED", "PRUNED", "PRUNED", "PRUNED"]
    assert claimed == [0, 1]  # what was interrupted, then what belongs to the top


def test_two_workers_never_take_up_the_same_trial(tmp_path: Path) -> None:
    study, _ = pause_two(tmp_path, n_trials=7)
    lift_one(study)
    other = open_study(pausing_config(tmp_path, n_trials=7), tmp_path)

    claims = [run.number for worker in (other, study) for run in worker.claim(1)]

    assert claims == [1, 6]


def test_without_pausing_the_checkpoint_goes_when_the_trial_ends(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    run, other = study.claim(2)
    study.report([at(run, 1, 3.0), at(other, 1, 4.0)])

    study.prune(Stop(trial_number=run.number, reason="rung 1"))

    assert [has_checkpoint(run), has_checkpoint(other)] == [False, True]


def test_only_the_rung_rule_takes_trials_up_again() -> None:
    with pytest.raises(ConfigError, match=r"pruner.resume_paused: works only with the rungs of asha"):
        PrunerConfig(name="median", resume_paused=True)
    with pytest.raises(ConfigError, match=r"study.keep_gib: must be at least 0, got -1"):
        StudyConfig(keep_gib=-1)


@pytest.mark.slow
def test_a_trial_that_was_taken_up_again_measures_what_an_undisturbed_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = (
        "-cn",
        "smoke",
        "engine.device=cpu",
        "sampler=random",
        "study.n_trials=18",
        "optim.lr=5e-3",
        "pruner.reduction_factor=3",
    )
    codes = [
        run_sweep(monkeypatch, tmp_path, *sweep, f"pruner={name}", f"study.name={name}") for name in PRUNERS
    ]
    storage = f"sqlite:///{tmp_path}/runs/lora_search.db"
    paused, whole = (SweepStudy.read(StudyConfig(name=name, storage=storage))[0] for name in PRUNERS)

    assert codes == [0, 0]
    pruned = Counter(re.findall(r"trial (\d+) pruned at rung", capsys.readouterr().out))
    taken_up = [int(number) for number, times in pruned.items() if times > 1]
    assert taken_up != []
    assert all(len(paused[number].perplexities) > 1 for number in taken_up)
    for one, other in zip(paused, whole, strict=True):
        shared = {rung: other.perplexities[rung] for rung in one.perplexities}
        assert one.perplexities == pytest.approx(shared, rel=1e-5)  # others shared its passes
