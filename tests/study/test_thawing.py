"""pruner=freeze_thaw in a real study on SQLite; the engine is simulated."""

import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from optuna.trial import TrialState

from lora_search.errors import ConfigError
from lora_search.results.ranking import best_of
from lora_search.search.trials import PAUSED
from lora_search.settings.schema import PrunerConfig, SamplerConfig, SweepConfig
from lora_search.settings.space import parse_space
from lora_search.study.study import BASE_WIDTH, SweepStudy
from lora_search.trial import EndReason, Measurement, Stop, TrialRun
from tests.benchmarks.families import families
from tests.benchmarks.in_study import regret_in_replay, regret_in_study
from tests.benchmarks.surrogate import Surrogate
from tests.study.test_pausing import at, has_checkpoint
from tests.study.test_study import RUNGS, SIX_POINTS, SPAWN, make_config, simulate, states

SLOTS, TRIAL_TOKENS = 3, 100 * RUNGS
FREEZE_THAW = PrunerConfig(name="freeze_thaw")


class Interrupt(Exception):
    """Ends a worker between two rungs."""


def thawing_config(folder: Path, n_trials: int | None = 10, **changes: object) -> SweepConfig:
    config = make_config(folder, pruner=FREEZE_THAW)
    return replace(config, study=replace(config.study, n_trials=n_trials, **changes))  # type: ignore[arg-type]


def opened(config: SweepConfig, folder: Path) -> SweepStudy:
    known = {BASE_WIDTH: "576", "data.train_tokens": str(TRIAL_TOKENS)}
    study = SweepStudy.open(config, parse_space(config), {"a": "1"}, known, folder)
    study.num_slots = SLOTS
    return study


def curve(run: TrialRun, rung: int, ended: EndReason | None = None) -> Measurement:
    """Uneven curves, lower for learning rates near 1e-3."""
    noise = 0.3 * math.sin(5 * run.number + 3 * rung)
    perplexity = 10 + 2 * abs(math.log10(run.settings.lr) + 3) + 5 * math.exp(-0.5 * rung) + noise
    return at(run, rung, perplexity, is_last=ended is not None)


def overfitting(run: TrialRun, rung: int, ended: EndReason | None = None) -> Measurement:
    """Curves whose second rung is the best; beyond it, the better one was the more it rises."""
    level = abs(math.log10(run.settings.lr) + 3)
    perplexity = [12, 10, 13, 16][rung - 1] + (level if rung <= 2 else 2 - level)
    best = min(perplexity, 10 + level) if rung > 1 else perplexity
    return replace(at(run, rung, perplexity, is_last=ended is not None), best_perplexity=best)


def told(study: SweepStudy) -> list[object]:
    return [(row.number, row.state, row.params, row.perplexities) for row in study.rows()]


def resumed(study: SweepStudy) -> list[int]:
    return [t.number for t in study.study.get_trials() if t.user_attrs.get(PAUSED) is False]


def work_beside_others(folder: Path, gate: Barrier) -> None:
    """A worker process of its own, which trains once all have trials."""
    gates = [gate]

    def curve_together(run: TrialRun, rung: int, ended: EndReason | None) -> Measurement:
        while gates:
            gates.pop().wait(100)
        return curve(run, rung, ended)

    simulate(opened(thawing_config(folder), folder), SLOTS, curve_together)


def interrupting_at(tick: int) -> Callable[[], None]:
    ticks = iter(range(tick))

    def count() -> None:
        if next(ticks, None) is None:
            raise Interrupt

    return count


def work_until_the_second_tick(folder: Path) -> None:
    """Be a worker that is killed while its trials train for the second time, or ends the study."""
    ticks = iter(range(2))

    def tick() -> None:
        if next(ticks) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    simulate(opened(thawing_config(folder), folder), SLOTS, curve, tick)


def test_a_study_begins_n_trials_pauses_and_resumes_and_leaves_nothing_open(tmp_path: Path) -> None:
    study = opened(thawing_config(tmp_path), tmp_path)

    simulate(study, SLOTS, curve)

    assert study.is_finished
    assert study.summary().finished == len(study.rows()) == 10
    assert states(study).keys() == {"COMPLETE", "PRUNED"}
    assert resumed(study) != []
    assert {t.state for t in study.study.get_trials()} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert not list(tmp_path.glob("trials/*/checkpoint"))
    best = min(study.rows(), key=lambda row: row.perplexity or math.inf)
    assert best.state == "COMPLETE"
    assert len(best.perplexities) == RUNGS
    trained = sum(len(row.perplexities) for row in study.rows())
    assert trained < 0.8 * 10 * RUNGS
    assert len({str(row.params) for row in study.rows()}) == 10


def test_the_first_trials_are_those_of_every_search(tmp_path: Path) -> None:
    other = replace(thawing_config(tmp_path / "other"), pruner=PrunerConfig())
    firsts = []
    for config, folder in ((thawing_config(tmp_path), tmp_path), (other, tmp_path / "other")):
        study = opened(config, folder)
        firsts.append([run.settings for run in study.claim(3)])

    assert firsts[0] == firsts[1]


def test_a_search_that_is_interrupted_at_every_tick_is_the_same_search(tmp_path: Path) -> None:
    whole = opened(thawing_config(tmp_path / "whole"), tmp_path / "whole")
    simulate(whole, SLOTS, curve)

    starts = 0
    while not (study := opened(thawing_config(tmp_path / "cut"), tmp_path / "cut")).is_finished:
        starts += 1
        with suppress(Interrupt):
            simulate(study, SLOTS, curve, interrupting_at(tick=1))
        study.hand_back("interrupted")

    assert starts > 5
    assert told(study) == told(whole)


@pytest.mark.slow
def test_a_search_whose_worker_is_killed_at_every_other_tick_is_the_same_search(tmp_path: Path) -> None:
    whole = opened(thawing_config(tmp_path / "whole"), tmp_path / "whole")
    simulate(whole, SLOTS, curve)

    exits: list[int | None] = []
    while exits[-1:] != [0]:
        process = SPAWN.Process(target=work_until_the_second_tick, args=(tmp_path / "cut",))
        process.start()
        process.join(120)
        exits.append(process.exitcode)

    assert exits.count(-signal.SIGKILL) == len(exits) - 1 > 5
    assert told(opened(thawing_config(tmp_path / "cut"), tmp_path / "cut")) == told(whole)


def test_two_workers_share_a_study(tmp_path: Path) -> None:
    study, gate = opened(thawing_config(tmp_path), tmp_path), SPAWN.Barrier(2)
    workers = [SPAWN.Process(target=work_beside_others, args=(tmp_path, gate)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)

    assert [worker.exitcode for worker in workers] == [0, 0]
    assert study.is_finished
    assert study.summary().finished == 10
    assert study.summary().complete >= 1
    points = [str(row.params) for row in study.rows()]
    assert len(set(points)) == len(points) == 10


def test_a_trial_that_makes_room_says_for_whom(tmp_path: Path) -> None:
    study = opened(thawing_config(tmp_path), tmp_path)
    study.num_slots = 2
    runs = study.claim(2)
    study.report([at(runs[0], 1, 40.0), at(runs[0], 2, 8.0), at(runs[1], 1, 60.0), at(runs[1], 2, 60.0)])

    (stop,) = study.judge()

    assert stop.trial_number == 1
    assert stop.reason == "rung 2: paused in favour of settings that wait"  # of the first trials
    assert study.prune(stop) == "PRUNED"
    assert [row.state for row in study.rows()][:2] == ["RUNNING", "PRUNED"]


def test_a_trial_between_two_rungs_is_not_judged(tmp_path: Path) -> None:
    study = opened(thawing_config(tmp_path), tmp_path)
    bad, good = study.claim(2)
    study.report([at(bad, 1, 60.0), at(good, 1, 10.0)])
    study._at_rung.discard(bad.number)

    stops = study.judge()

    assert bad.number not in [stop.trial_number for stop in stops]


def test_before_the_first_rung_that_the_settings_name_nobody_makes_room(tmp_path: Path) -> None:
    config = thawing_config(tmp_path)
    study = opened(replace(config, pruner=PrunerConfig(name="freeze_thaw", first_rung=3)), tmp_path)

    simulate(study, SLOTS, curve)

    assert study.is_finished
    assert min(len(row.perplexities) for row in study.rows()) == 3


def test_a_paused_trial_without_its_checkpoint_here_is_not_resumed(tmp_path: Path) -> None:
    study = opened(thawing_config(tmp_path), tmp_path)

    def forgetful(run: TrialRun, rung: int, ended: EndReason | None = None) -> Measurement:
        measured = curve(run, rung, ended)
        shutil.rmtree(Path(run.folder) / "checkpoint")
        return measured

    simulate(study, SLOTS, forgetful)

    assert study.is_finished
    assert resumed(study) == []
    assert states(study)["PRUNED"] >= 5


def test_the_best_trial_is_complete_also_where_going_on_makes_it_worse(tmp_path: Path) -> None:
    study = opened(thawing_config(tmp_path, 14), tmp_path)

    simulate(study, SLOTS, overfitting)

    best = min(study.rows(), key=lambda row: row.perplexity or math.inf)
    assert (best.state, best_of(study.rows())) == ("COMPLETE", best)
    assert study.summary().best_perplexity == best.perplexity
    assert len(best.perplexities) < RUNGS


def test_a_token_budget_is_spent_and_a_larger_one_goes_on_with_what_was_paused(tmp_path: Path) -> None:
    small, large = (thawing_config(tmp_path, None, max_tokens=n * TRIAL_TOKENS) for n in (4, 8))
    study = opened(small, tmp_path)
    simulate(study, SLOTS, curve)
    study.hand_back("the budget is spent")
    tokens = sum(row.train_tokens for row in study.rows())
    paused = [row.number for row in study.rows() if row.is_paused]
    assert best_of(study.rows()) == min(study.rows(), key=lambda row: row.perplexity or math.inf)

    again = opened(large, tmp_path)
    simulate(again, SLOTS, curve)

    assert 4 * TRIAL_TOKENS - 100 * SLOTS < tokens <= 4 * TRIAL_TOKENS
    assert set(paused) & {r.number for r in again.rows() if len(r.perplexities) > 1}
    assert 7 * TRIAL_TOKENS < sum(row.train_tokens for row in again.rows()) <= 8 * TRIAL_TOKENS


def test_a_space_that_can_be_counted_is_tried_once(tmp_path: Path) -> None:
    study = opened(replace(thawing_config(tmp_path, 50), space=SIX_POINTS), tmp_path)

    simulate(study, SLOTS, curve)

    assert study.is_finished
    assert len({str(row.params) for row in study.rows()}) == len(study.rows()) == 6
    assert study.attributes()["exhausted"] == "all 6 combinations of the space have been tried"
    assert states(study).keys() == {"COMPLETE", "PRUNED"}


def test_a_study_with_trials_gets_a_wider_range_and_more_choices_and_goes_on(tmp_path: Path) -> None:
    narrow = {"lora": {"r": "choice(8, 16)"}, "optim": {"lr": "tag(log, interval(1e-5, 1e-4))"}}
    wide = {"lora": {"r": "choice(8, 16, 64)"}, "optim": {"lr": "tag(log, interval(1e-6, 1e-2))"}}
    for n_trials, space in ((6, narrow), (14, wide)):
        study = opened(replace(thawing_config(tmp_path, n_trials), space=space), tmp_path)
        simulate(study, SLOTS, curve)

    before, after = study.rows()[:6], study.rows()[6:]
    assert study.is_finished
    assert [len(before), len(after)] == [6, 8]
    assert {row.params["lora.r"] for row in before} == {8, 16}
    assert 64 in {row.params["lora.r"] for row in after}
    assert max(row.params["optim.lr"] for row in after) > 1e-4  # type: ignore[type-var]


def test_a_worker_that_does_not_know_new_choices_leaves_what_is_paused_to_those_that_do(
    tmp_path: Path,
) -> None:
    grown = {"lora": {"r": "choice(8, 16, 32, 64)"}, "optim": {"lr": "tag(log, interval(1e-5, 1e-2))"}}
    old = opened(thawing_config(tmp_path), tmp_path)
    runs = old.claim(4)
    old.report([at(run, 1, 10.0 + run.number) for run in runs])
    for run in runs:
        old.prune(Stop(trial_number=run.number, reason="rung 1: paused"))
        shutil.rmtree(Path(run.folder) / "checkpoint")  # so that this worker can only begin new ones
    new = opened(replace(thawing_config(tmp_path), space=grown), tmp_path)

    claims = [old.claim(1) for _ in range(3)]

    assert claims == [[], [], []]
    assert old.draws.outdated
    assert [row.number for row in new.rows() if row.is_paused] == [0, 1, 2, 3]


def test_a_diverged_trial_is_never_resumed(tmp_path: Path) -> None:
    study = opened(thawing_config(tmp_path), tmp_path)

    def explosive(run: TrialRun, rung: int, ended: EndReason | None = None) -> Measurement:
        if run.settings.lr > 2e-3 and rung == 2:
            nan = replace(at(run, rung, math.nan, is_last=True), ended="diverged", detail="loss not finite")
            return replace(nan, best_perplexity=curve(run, 1).perplexity)
        return curve(run, rung, ended)

    simulate(study, SLOTS, explosive)

    fast = [row for row in study.rows() if row.params["optim.lr"] > 2e-3]  # type: ignore[operator]
    assert study.is_finished
    assert fast != []
    assert {len(row.perplexities) for row in fast} == {1}
    assert Counter(row.state for row in fast) == {"PRUNED": len(fast)}


def test_beyond_the_disk_budget_the_worst_paused_trials_are_out_for_good(tmp_path: Path) -> None:
    study = opened(thawing_config(tmp_path, keep_gib=150 / 2**30), tmp_path)
    runs = study.claim(3)
    study.report([at(run, 1, 10.0 + run.number) for run in runs])
    for run in runs[1:]:
        assert study.pauses is not None
        study.pauses.pause(run.number, study.worker, "rung 1: paused")

    assert [t.state.name for t in study.study.get_trials()[:3]] == ["RUNNING", "RUNNING", "PRUNED"]
    assert [has_checkpoint(run) for run in runs] == [True, True, False]


@pytest.mark.parametrize("sampler", ["gp", "cmaes", "qmc", "grid"])
def test_another_sampler_beside_it_is_refused(tmp_path: Path, sampler: str) -> None:
    config = replace(thawing_config(tmp_path), sampler=SamplerConfig(name=sampler), space=SIX_POINTS)

    message = rf"sampler.name: draws nothing beside pruner=freeze_thaw, got '{sampler}'. Leave sampler out"
    with pytest.raises(ConfigError, match=message):
        opened(config, tmp_path)


def test_the_sampler_that_draws_at_random_may_be_named(tmp_path: Path) -> None:
    config = replace(thawing_config(tmp_path), sampler=SamplerConfig(name="random"))

    assert [run.number for run in opened(config, tmp_path).claim(2)] == [0, 1]


@pytest.mark.slow
def test_a_real_study_finds_what_the_replay_says() -> None:
    (family,) = families("faq")
    truth = Surrogate(family)
    tasks = [truth.task(seed) for seed in range(4)]

    study, replay = (
        [regret(family, task, seed, budget=12) for seed, task in enumerate(tasks)]
        for regret in (regret_in_study, regret_in_replay)
    )

    assert sum(study) / 4 == pytest.approx(sum(replay) / 4, abs=0.003)
    assert sum(study) / 4 < 0.003  # that of pruner=asha is 0.005
