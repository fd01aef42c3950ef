"""What a study may spend: counted over starts, shared out to the trials in front, never exceeded."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import event

from lora_search.errors import ConfigError
from lora_search.settings.schema import PrunerConfig, StudyConfig, SweepConfig
from lora_search.settings.space import parse_space
from lora_search.study.budget import KEY, Interval, Need, affordable, covered_seconds
from lora_search.study.opening_checks import check_room
from lora_search.study.study import SweepStudy
from tests.study.test_study import RUNGS, make_config, measure, simulate, states

RUNG_TOKENS = 100  # of tests.study.test_study.measure
TRIAL_TOKENS = RUNGS * RUNG_TOKENS


class Clock:
    """The wall's clock, moved by hand."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def limited(
    tmp_path: Path, *, n_trials: int | None = None, prunes: bool = True, **limits: float
) -> SweepConfig:
    config = make_config(tmp_path, pruner=PrunerConfig(name="asha" if prunes else "none"))
    return replace(config, study=replace(config.study, n_trials=n_trials, **limits))  # type: ignore[arg-type]


def open_budgeted(config: SweepConfig, tmp_path: Path, clock: Clock | None = None) -> SweepStudy:
    clock, known = clock or Clock(), {"data.train_tokens": str(TRIAL_TOKENS)}
    return SweepStudy.open(
        config, parse_space(config), {"a": "1"}, known, tmp_path, began=clock(), clock=clock
    )


def train(study: SweepStudy, slots: int = 4, tick: Callable[[], None] = lambda: None) -> None:
    simulate(study, slots, tick=tick)
    study.hand_back("the budget is spent")


def tokens_of(study: SweepStudy) -> int:
    return sum(row.train_tokens for row in study.rows())


def test_time_that_two_workers_share_counts_once_and_a_pause_not_at_all() -> None:
    both = [Interval(0, 100), Interval(50, 130), Interval(60, 70)]

    assert covered_seconds([*both, Interval(500, 520)]) == 150


def test_the_trials_in_front_are_given_what_they_need_to_their_end() -> None:
    needs = [Need(1, 10, 30), Need(2, 10, 30), Need(3, 10, 30), Need(4, 10, 30)]

    assert affordable(needs, 75) == ({1, 2, 3}, 5)
    assert affordable(needs, 120) == ({1, 2, 3, 4}, 0)
    assert affordable(needs, 9) == (set(), 9)


@pytest.mark.parametrize("max_tokens", [700, 1650, 4050])
def test_a_token_budget_is_spent_on_new_trials_and_never_exceeded(tmp_path: Path, max_tokens: int) -> None:
    study = open_budgeted(limited(tmp_path, max_tokens=max_tokens), tmp_path)

    train(study)

    assert max_tokens - RUNG_TOKENS < tokens_of(study) <= max_tokens
    assert study.summary().complete >= 1
    assert study.summary().running == 0


def test_a_token_budget_draws_more_trials_than_it_could_train_to_their_end(tmp_path: Path) -> None:
    study = open_budgeted(limited(tmp_path, max_tokens=12 * TRIAL_TOKENS), tmp_path)

    train(study)

    assert study.summary().finished > 12


def test_n_trials_ends_a_sweep_whose_budget_is_not_spent(tmp_path: Path) -> None:
    study = open_budgeted(limited(tmp_path, n_trials=3, max_tokens=100 * TRIAL_TOKENS), tmp_path)

    train(study)

    assert study.summary().finished == 3
    assert study.is_finished


def test_trials_that_the_budget_cuts_short_go_on_where_they_were_once_it_is_raised(tmp_path: Path) -> None:
    study = open_budgeted(limited(tmp_path, max_tokens=1100, n_trials=4, prunes=False), tmp_path)
    train(study)
    cut_short = {row.number: row.perplexities for row in study.rows() if row.state == "WAITING"}
    assert cut_short
    assert study.budget.is_over or not study.claim(1)

    again = open_budgeted(limited(tmp_path, max_tokens=5000, n_trials=4, prunes=False), tmp_path)
    train(again)

    rows = again.rows()
    assert states(again) == {"COMPLETE": 4}
    assert all(rows[number].perplexities.items() >= known.items() for number, known in cut_short.items())
    assert tokens_of(again) == 4 * TRIAL_TOKENS


def test_hours_count_over_all_starts_and_end_the_sweep_in_time(tmp_path: Path) -> None:
    clock = Clock()
    config = limited(tmp_path, max_hours=0.5)

    def tick() -> None:
        clock.now += 150.0

    first = open_budgeted(config, tmp_path, clock)
    clock.now += 300.0  # to load the model
    first.heartbeat()
    first.hand_back("interrupted")
    clock.now += 7200.0  # nobody works
    began = clock.now
    second = open_budgeted(config, tmp_path, clock)

    train(second, tick=tick)

    assert 1500.0 - 150.0 <= clock.now - began <= 1500.0
    assert second.summary().complete >= 1


def test_every_worker_is_paid_for_and_one_that_vanished_only_until_it_was_last_seen(tmp_path: Path) -> None:
    clock = Clock()
    config = limited(tmp_path, max_cost=10.0, price_per_hour=2.0, n_trials=8)
    one, other = (
        open_budgeted(config, tmp_path, clock),
        open_budgeted(config, tmp_path, Clock(clock.now + 0.5)),
    )
    clock.now += 1800.0
    one.heartbeat()

    [limit] = one.budget.limits()

    assert (limit.key, limit.limit) == ("study.max_cost", 10.0)
    assert limit.spent == pytest.approx(1.0)  # half an hour of one; the other was seen once
    assert other.worker == one.worker


@pytest.mark.parametrize(("limits", "reads"), [({"max_tokens": 10_000}, 0), ({"max_hours": 9.0}, 3)])
def test_the_time_of_others_is_read_as_often_as_it_counts(
    tmp_path: Path, limits: dict[str, float], reads: int
) -> None:
    clock, seen = Clock(), list[str]()
    study = open_budgeted(limited(tmp_path, **limits), tmp_path, clock)
    for number in range(100):  # they are read every 20 seconds
        key = f"{KEY}elsewhere:{number}:1@{clock.now}"
        study.storage.set_study_system_attr(study.table.study_id, key, [clock.now, clock.now, True])
    study.account.read()
    event.listen(study.storage.engine, "before_cursor_execute", lambda *call: seen.append(call[2]))

    clock.now += 15.0
    study.account.note()
    assert study.account.spent(0).worker_hours == pytest.approx(101 * 15 / 3600)  # none has been read again
    for _ in range(50):
        clock.now += 1.0
        study.account.note()

    assert sum(sql.strip().endswith("study_system_attributes.study_id = ?") for sql in seen) == reads
    assert sum(sql.startswith("UPDATE study_system_attributes") for sql in seen) == 6


def test_no_trial_begins_that_could_not_reach_a_rung_in_time(tmp_path: Path) -> None:
    clock = Clock()
    study = open_budgeted(limited(tmp_path, max_hours=0.1), tmp_path, clock)
    [run] = study.claim(1)
    clock.now += 100.0
    study.report([measure(run, 1)])

    clock.now += 200.0  # 60 of 360 seconds are left, and a rung takes 100
    assert not study.budget.is_over
    assert study.claim(1) == []
    study.report([measure(run, 2)])
    assert [stop.trial_number for stop in study.beyond_budget([run.number])] == [run.number]


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_hours": 0.0}, "study.max_hours: must be > 0, or null, got 0.0"),
        ({"max_hours": float("nan")}, "study.max_hours: must be > 0, or null, got nan"),
        ({"max_tokens": -1}, "study.max_tokens: must be > 0, or null, got -1"),
        ({"price_per_hour": float("inf")}, "study.price_per_hour: must be at most 1,000,000, got inf"),
        ({"max_cost": 5.0}, "study.max_cost: needs study.price_per_hour, got 5.0"),
        ({"n_trials": None}, "study.n_trials: must be a number if no budget is set, got None"),
        ({"n_trials": 0}, "study.n_trials: must be at least 1"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudyConfig(**keys)  # type: ignore[arg-type]


def test_a_ninth_worker_on_one_sqlite_file_is_refused_until_one_of_the_others_ends(tmp_path: Path) -> None:
    config = limited(tmp_path, n_trials=4)
    study = open_budgeted(config, tmp_path, Clock(time.time()))
    for number in range(7):  # seven more of this process
        key, now = f"{KEY}{study.worker}@{number}", time.time()
        study.storage.set_study_system_attr(study.table.study_id, key, [now, now, True])

    with pytest.raises(ConfigError, match="study.storage: has 8 workers at work, and SQLite .*postgres"):
        check_room(config.study)

    study.hand_back("done")
    check_room(config.study)
