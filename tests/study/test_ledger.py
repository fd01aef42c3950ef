"""The ledger is right whatever others do, and a large study costs as many statements as a small one."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from sqlalchemy import event

from lora_search.database.changes import Changes
from lora_search.database.storage import quieten_optuna
from lora_search.search.trials import PAUSED, Cursor
from lora_search.settings.schema import SamplerConfig
from lora_search.study.budget import read_intervals
from lora_search.study.ledger import Ledger
from lora_search.study.study import SweepStudy
from lora_search.trial import Stop
from tests.study.test_study import make_config, measure, open_study


@pytest.fixture
def study() -> optuna.Study:
    quieten_optuna()
    return optuna.create_study()


def test_each_trial_is_told_as_finished_once_whatever_the_order(study: optuna.Study) -> None:
    cursor, told = Cursor(study), Counter[int]()
    for _ in range(5):
        first, second, third = (study.ask() for _ in range(3))
        told.update(t.number for t in cursor.read(everything=False)[0])
        study.tell(third, 1.0)
        study.tell(first, state=TrialState.FAIL)
        told.update(t.number for t in cursor.read(everything=False)[0])
        study.tell(second, 2.0)

    finished, unfinished = cursor.read(everything=True)
    told.update(t.number for t in finished)

    assert told == Counter(range(15))
    assert unfinished == []


def test_what_others_began_and_ended_meanwhile_is_noticed_at_the_next_new_trial(study: optuna.Study) -> None:
    cursor = Cursor(study)
    study.add_trial(create_trial(value=1.0))
    seen = [cursor.read(everything=False)[0]]
    own = study.ask()

    finished, unfinished = cursor.read(everything=False)

    assert seen == [[]]
    assert ([t.number for t in finished], [t.number for t in unfinished]) == ([0], [own.number])


def test_counts_and_best_are_those_of_all_trials(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path).study
    study = optuna.create_study(storage=study._storage, study_name="other")
    ledger = ledger_of(study)
    for value in (3.0, 2.0, 2.0):
        trial = study.ask()
        trial.report(value, 1)
        study.tell(trial, value)
        ledger.read()
    study.tell(study.ask(), state=TrialState.PRUNED)
    study.ask().set_user_attr(PAUSED, True)
    refused = study.ask()
    refused.set_user_attr("reason", "duplicate of trial 0")
    study.tell(refused, state=TrialState.FAIL)
    study.tell(study.ask(), state=TrialState.FAIL)
    study.ask()
    ledger.read()

    summary = ledger.summary(10)

    assert (summary.complete, summary.pruned, summary.failed, summary.running) == (3, 2, 1, 1)
    assert (summary.finished, summary.best_number, summary.best_perplexity) == (5, 1, 2.0)
    assert ledger.num_not_failed(before=7) == 5  # trials 5 and 6 have


def ledger_of(study: optuna.Study) -> Ledger:
    return Ledger(Changes(study._storage._backend, study._study_id).read, study.pruner)  # type: ignore[attr-defined]


@contextmanager
def counted(study: SweepStudy, counts: list[int]) -> Iterator[None]:
    """Append how many statements the database was sent."""
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(study.storage.engine, "before_cursor_execute", note)
    yield
    event.remove(study.storage.engine, "before_cursor_execute", note)
    counts.append(len(statements))


def statements_of_one_trial(folder: Path, num_trials: int) -> list[int]:
    """Return the statements of claim, report, judge and finish in a study that has so many trials."""
    config = make_config(folder, n_trials=num_trials + 1, sampler=SamplerConfig(n_startup_trials=3))
    config.study.first_trial_is_default = False
    study, counts = open_study(config, folder), list[int]()
    study.study.add_trials(
        create_trial(
            value=float(number),
            params={"lora.r": 8, "optim.lr": 1e-3},
            distributions=study.space.distributions,
            intermediate_values={1: float(number)},
        )
        for number in range(num_trials)
    )
    study = open_study(config, folder)
    with counted(study, counts):
        (run,) = study.claim(1)
    with counted(study, counts):
        study.report([measure(run, 1)])
    with counted(study, counts):
        study.judge()
    with counted(study, counts):
        study.finish(measure(run, 4, "finished"))
    return counts


def test_a_large_study_sends_no_more_statements_than_a_small_one(tmp_path: Path) -> None:
    small = statements_of_one_trial(tmp_path / "small", 10)
    large = statements_of_one_trial(tmp_path / "large", 100)

    assert large == small
    assert min(small) > 0


def test_a_tick_with_heartbeat_takes_at_most_ten_statements(tmp_path: Path) -> None:
    on_sqlite = 3  # to begin two transactions, and for the highest id of the attributes
    study, counts = open_study(make_config(tmp_path, n_trials=4), tmp_path), list[int]()
    runs = study.claim(4)
    study.report([measure(run, 1) for run in runs])
    study.judge()
    study.heartbeat()
    study._last_heartbeat = -math.inf  # the next one is due

    with counted(study, counts):
        study.report([measure(run, 2) for run in runs])
        study.judge()
        study.heartbeat()
        study.summary()

    assert counts[0] - on_sqlite <= 10


def test_a_summary_asks_again_only_for_what_a_judgement_has_not_just_read(tmp_path: Path) -> None:
    study, counts = open_study(make_config(tmp_path, n_trials=4), tmp_path), list[int]()
    runs = study.claim(2)
    study.report([measure(run, 1) for run in runs])
    study.judge()

    with counted(study, counts):
        before = study.summary()
    study.prune(Stop(trial_number=runs[0].number, reason="rung 1: too late"))
    with counted(study, counts):
        after = study.summary()

    assert (before.running, before.pruned) == (2, 0)
    assert (after.running, after.pruned) == (1, 1)
    assert counts[0] == 0
    assert counts[1] > 0


def test_a_worker_notes_its_time_in_one_statement(tmp_path: Path) -> None:
    study, counts = open_study(make_config(tmp_path), tmp_path), list[int]()

    with counted(study, counts):
        study.account.close()

    assert counts == [2]  # BEGIN and UPDATE
    [interval] = read_intervals(study.storage, study.table.study_id).values()
    assert not interval.is_open
