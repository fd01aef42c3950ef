"""A look tells what anybody has changed, and no more. Real SQLite files; Optuna's own writers and ours."""

from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from lora_search.database.changes import LATE_SECONDS, REFRESH_SECONDS, Changes
from lora_search.database.storage import open_storage
from lora_search.database.trial_table import TrialTable
from lora_search.settings.schema import StudyConfig

X = {"x": FloatDistribution(0, 1)}


class Pair:
    """A study as Optuna writes it, and the looks of one of our workers at it."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder}/study.db"
        storage = open_storage(StudyConfig(name="s", storage=self.url))
        self.study = optuna.create_study(study_name="s", storage=RDBStorage(self.url))
        self.table, self.now = TrialTable(storage, "s"), 0.0
        self.changes = Changes(storage, self.table.study_id, lambda: self.now)

    def told(self) -> dict[int, str]:
        return {trial.number: trial.state.name for trial in self.changes.read()}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    pair = Pair(tmp_path)
    pair.study.add_trial(create_trial(value=1.0, params={"x": 0.5}, distributions=X))
    return pair


def test_trials_are_read_as_optuna_reads_them(pair: Pair) -> None:
    trial = pair.study.ask(X)
    trial.report(float("inf"), 1)
    trial.report(float("nan"), 2)
    trial.report(2.5, 3)
    trial.set_user_attr("list", [1, None])
    pair.study.enqueue_trial({"x": 0.25})

    ours, theirs = list(pair.changes.read()), pair.study.get_trials()

    assert [repr(t) for t in ours] == [repr(t) for t in theirs]  # NaN differs from itself
    assert len(ours) == 3


def test_every_writers_change_is_told_once(pair: Pair) -> None:
    assert pair.told() == {0: "COMPLETE"}
    assert pair.told() == {}
    trial = pair.study.ask(X)
    assert pair.told() == {1: "RUNNING"}
    trial.report(3.0, 1)
    assert pair.told() == {1: "RUNNING"}
    trial.set_user_attr("worker", "other")
    assert pair.told() == {1: "RUNNING"}
    for _ in range(2):  # the second time the attribute is there already
        with pair.table.locked(1) as locked:
            locked.write({"worker": "mine"})
        assert pair.told() == {1: "RUNNING"}
    for tokens in (7, 8):
        with pair.table.locked(1) as locked:
            locked.keep("progress", {"train_tokens": tokens})
        assert pair.told() == {1: "RUNNING"}
    assert pair.told() == {}
    pair.study.add_trial(create_trial(value=2.0, params={"x": 0.1}, distributions=X))
    pair.study.tell(trial, 1.5)
    assert pair.told() == {1: "COMPLETE", 2: "COMPLETE"}
    assert pair.told() == {}


def test_what_another_program_changes_in_place_is_told_within_a_minute(pair: Pair) -> None:
    trial = pair.study.ask(X)
    trial.set_user_attr("worker", "other")
    pair.told()
    pair.now += LATE_SECONDS
    assert pair.told() == {1: "RUNNING"}  # what was being written at the first look
    trial.set_user_attr("worker", "else")

    unnoticed = pair.told()
    pair.now += REFRESH_SECONDS + 1

    assert unnoticed == {}
    (seen,) = pair.changes.read()
    assert seen.user_attrs["worker"] == "else"


def test_a_look_that_breaks_off_tells_its_rest_at_the_next(pair: Pair) -> None:
    for _ in range(2):
        pair.study.ask(X).report(1.0, 1)
    look = pair.changes.read()
    first = next(look).number
    look.close()

    assert (first, pair.told()) == (0, {1: "RUNNING", 2: "RUNNING"})


def test_an_unfinished_trial_that_is_deleted_is_an_error(pair: Pair) -> None:
    pair.study.ask(X)
    pair.told()
    optuna.delete_study(study_name="s", storage=pair.url)

    with pytest.raises(KeyError, match="Record does not exist"):
        pair.told()


def test_trials_put_back_and_taken_again_between_two_looks_are_told(pair: Pair) -> None:
    pair.study.ask(X)
    pair.told()
    with pair.table.locked(1) as trial:
        trial.write({"worker": ""}, TrialState.WAITING)
    pair.study.ask(X)

    assert pair.told() == {1: "RUNNING"}
