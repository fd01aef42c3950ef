"""What other programs do to a study, or to its database, before and under a sweep. Real SQLite files."""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from lora_search.database.presence import worker_name
from lora_search.errors import ConfigError, LoraSearchError, StudyError
from lora_search.results.ranking import base_of
from lora_search.search.trials import PROGRESS, SETTINGS, trial_rows
from lora_search.settings.schema import SamplerConfig, SweepConfig
from lora_search.study.identity import Identity, find_identity
from lora_search.study.opening_checks import check_adoptable
from lora_search.study.study import SweepStudy
from lora_search.study.view import StudyView
from lora_search.trial import Measurement, TrialRow
from lora_search.worker.worker import work
from tests.study.test_study import make_config, measure, open_study, simulate
from tests.worker.test_worker import CurveEngine, RecordingTracker, quiet

OUTSIDE = [
    ({"lora.r": 64}, "outside the space: lora.r=64 is not in choice(8, 16, 32)"),
    ({"optim.lr": 0.5}, "outside the space: optim.lr=0.5 is not in tag(log, interval(1e-5, 1e-2))"),
    ({"optim.lr": "fast"}, "outside the space: optim.lr=fast is not in"),
    ({"optim.lr": float("nan")}, "outside the space: optim.lr=nan is not in"),
    ({"lora.r": [8, 16]}, "outside the space: lora.r=[8, 16] is not in"),
    ({"lora.r": {"a": 1}}, "outside the space: lora.r={'a': 1} is not in"),
    ({"lora.r": None}, "outside the space: lora.r=None is not in"),
    ({"lora.alpha": 8, "lora.r": 8}, "outside the space: lora.alpha is not searched"),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("params", "reason"), OUTSIDE)
def test_a_point_outside_the_space_fails_with_the_reason_and_the_sweep_goes_on(
    tmp_path: Path, params: dict[str, object], reason: str
) -> None:
    config = make_config(tmp_path, n_trials=3, sampler=SamplerConfig(name="random"))
    first = open_study(config, tmp_path)
    first.claim(1)
    first.study.enqueue_trial(params)
    first.hand_back("interrupted")

    study = open_study(config, tmp_path)
    simulate(study, slots=2)

    assert (study.rows()[1].state, study.rows()[1].reason[: len(reason)]) == ("FAIL", reason)
    assert study.summary().finished == 3
    assert study.is_finished


def test_a_trial_put_in_line_with_parameters_of_other_kinds_fails_too(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path, n_trials=2), tmp_path)
    kind = {"other": CategoricalDistribution(("a", "b"))}
    study.study.add_trial(create_trial(state=TrialState.WAITING, params={"other": "a"}, distributions=kind))

    simulate(study)

    assert study.rows()[1].reason == "outside the space: other is not searched"
    assert study.summary().finished == 2


def test_a_parameter_that_another_program_made_of_another_kind_is_one_message(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.study.first_trial_is_default = False
    study = open_study(config, tmp_path)
    lr = {"optim.lr": CategoricalDistribution(("low", "high"))}
    study.study.add_trial(create_trial(value=3.0, params={"optim.lr": "low"}, distributions=lr))

    with pytest.raises(
        StudyError, match=r"study.name: 's' draws no trial: ValueError: .*new|another study.name"
    ):
        simulate(study)


def test_a_point_of_the_space_that_others_put_in_line_is_trained(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path, n_trials=2), tmp_path)
    study.study.enqueue_trial({"lora.r": 32})  # the learning rate is drawn

    runs = study.claim(2)

    assert runs[1].settings.r == 32


def made_by_others(config: SweepConfig, directions: Sequence[str], *, with_trial: bool) -> None:
    study = optuna.create_study(
        storage=config.study.storage, study_name=config.study.name, directions=list(directions)
    )
    if with_trial:
        x = {"x": FloatDistribution(0, 1)}
        study.add_trial(create_trial(values=[1.0] * len(directions), params={"x": 0.5}, distributions=x))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("directions", "with_trial", "rule"),
    [
        (["maximize"], False, "must be a study that minimizes one value, .* goals: maximize"),
        (["minimize", "minimize"], False, "goals: minimize, minimize"),
        (["minimize", "maximize"], True, "goals: minimize, maximize"),
        (["minimize"], True, "must be new or a study of lora_search"),
    ],
)
def test_a_study_of_another_program_is_refused_before_anything_is_written(
    tmp_path: Path, directions: list[str], with_trial: bool, rule: str
) -> None:
    config = make_config(tmp_path)
    made_by_others(config, directions, with_trial=with_trial)
    before = contents(tmp_path)

    for refuse in (
        lambda: check_adoptable(config.study),
        lambda: open_study(config, tmp_path),
        lambda: StudyView(config.study),
    ):
        with pytest.raises(ConfigError, match=f"study.name: .*{rule}") as caught:
            refuse()
        assert caught.value.exit_code == 2

    assert contents(tmp_path) == before


def test_an_empty_study_and_one_of_an_older_version_are_adopted(tmp_path: Path) -> None:
    empty, older = make_config(tmp_path / "a"), make_config(tmp_path / "b")
    for config, with_trial in ((empty, False), (older, True)):
        Path(config.study.storage.removeprefix("sqlite:///")).parent.mkdir()
        made_by_others(config, ["minimize"], with_trial=with_trial)
    name = {"study_name": "s", "storage": older.study.storage}
    optuna.load_study(**name).set_user_attr("fingerprint", {"a": "1"})

    check_adoptable(empty.study)
    check_adoptable(older.study)

    assert [run.number for run in open_study(empty, tmp_path).claim(1)] == [0]


def execute(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / "study.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def delete_file(folder: Path) -> None:
    (folder / "study.db").unlink()


def delete_all_files(folder: Path) -> None:
    for path in folder.glob("study.db*"):
        path.unlink()


def replace_file(folder: Path) -> None:
    (folder / "study.db").rename(folder / "away.db")
    open_study(make_config(folder / "new"), folder / "new")
    shutil.copy(folder / "new/study.db", folder / "study.db")


def delete_trial(folder: Path) -> None:
    execute(folder, "DELETE FROM trials WHERE number = 0")


def delete_finished_trials(folder: Path) -> None:
    execute(folder, "DELETE FROM trials WHERE state IN ('COMPLETE', 'PRUNED')")


def delete_study(folder: Path) -> None:
    optuna.delete_study(study_name="s", storage=f"sqlite:///{folder}/study.db")


class Attacked(CurveEngine):
    """Something happens to the database once the first trials are through."""

    def __init__(self, attack: Callable[[], object]) -> None:
        super().__init__(2)
        self.attack, self.ticks = attack, 0

    def advance(self) -> list[Measurement]:
        self.ticks += 1
        if self.ticks == 6:
            self.attack()
        return super().advance()


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (delete_file, "study.storage: .*study.db was deleted while the sweep ran. Its content is saved in"),
        (
            delete_all_files,
            "study.storage: .*study.db was deleted while the sweep ran. Its content is saved",
        ),
        (replace_file, "study.storage: .*study.db was replaced by another file while the sweep ran."),
        (
            delete_trial,
            "trials were deleted in the database while the sweep ran|some of its trials were deleted",
        ),
        (delete_finished_trials, "trials were deleted in the database while the sweep ran"),
        (delete_study, "study.name: 's' or some of its trials were deleted"),
    ],
)
def test_what_is_deleted_under_a_running_sweep_ends_it_with_one_message(
    tmp_path: Path, attack: Callable[[Path], None], message: str
) -> None:
    study = open_study(make_config(tmp_path, n_trials=12), tmp_path)

    with pytest.raises(StudyError, match=message):
        work(study, Attacked(lambda: attack(tmp_path)), RecordingTracker(), quiet()[0])


@pytest.mark.parametrize("attack", [delete_file, delete_all_files])
def test_what_a_deleted_database_held_is_saved_and_the_sweep_goes_on_with_it(
    tmp_path: Path, attack: Callable[[Path], None]
) -> None:
    config = make_config(tmp_path, n_trials=12)
    study = open_study(config, tmp_path)
    study.trials.worker = worker_name(os.getpid()) + "9"  # a process that runs no more when the copy is used
    with pytest.raises(StudyError):
        work(study, Attacked(lambda: attack(tmp_path)), RecordingTracker(), quiet()[0])
    held = {row.number: row.perplexities for row in study_rows(study)}
    study.storage.engine.dispose()
    (copy,) = tmp_path.glob("study.db.rescued-*")

    for path in [tmp_path / "study.db-wal", tmp_path / "study.db-shm"]:
        path.unlink(missing_ok=True)
    copy.rename(tmp_path / "study.db")
    again = open_study(config, tmp_path)

    assert {row.number: row.perplexities for row in again.rows()} == held
    assert len(held) > 2
    simulate(again)
    assert again.summary().finished == 12


def study_rows(study: SweepStudy) -> list[TrialRow]:
    """Return the trials without a look at the file that is gone."""
    return trial_rows(study.study.get_trials())


def test_a_deleted_file_is_not_called_done(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path, n_trials=2), tmp_path)
    simulate(study)
    delete_file(tmp_path)

    with pytest.raises(StudyError, match="was deleted"):
        study.rows()


GARBAGE = [None, 5, -1.5, "garbage", [1, 2], {"a": [None]}, True]
KEYS = ["worker", PROGRESS, "reason", SETTINGS, "retries", "died_at_rung", "recovery", "paused"]


@pytest.mark.parametrize("key", [*KEYS[:2], *(pytest.param(key, marks=pytest.mark.slow) for key in KEYS[2:])])
def test_a_study_in_which_others_wrote_attributes_is_read_and_goes_on(tmp_path: Path, key: str) -> None:
    config = make_config(tmp_path, n_trials=12, sampler=SamplerConfig(name="random"))
    study = open_study(config, tmp_path)
    runs = study.claim(9)
    study.report([measure(run, 1) for run in runs])
    study.finish(measure(runs[0], 1, "finished"))
    for run, value in zip(runs, GARBAGE, strict=False):
        table = "trial_system_attributes" if key in (PROGRESS, SETTINGS) else "trial_user_attributes"
        statement = f"UPDATE {table} SET value_json = ? WHERE trial_id = ? AND key = ?"
        arguments = (json.dumps(value), study.table.id_of(run.number), key)
        with closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
            changed = connection.execute(statement, arguments).rowcount
            if not changed:
                insert = f"INSERT INTO {table} (value_json, trial_id, key) VALUES (?, ?, ?)"
                connection.execute(insert, arguments)

    view = StudyView(config.study)
    assert len(view.rows()) == 9
    assert len(view.slots()) <= 9
    assert view.summary().n_trials == 12
    for run in runs[1:]:
        if run.number in study.held:
            study.report([measure(run, 2)])
    study.judge()
    study.hand_back("interrupted")
    again = open_study(replace(config), tmp_path)
    again.trials.worker = study.worker + "9"
    again.reclaim_stale()

    assert len(again.rows()) >= 9
    simulate(again)
    assert again.summary().finished >= 12 - len(GARBAGE)


@pytest.mark.parametrize("value", [None, 5, "garbage"], ids=repr)
@pytest.mark.parametrize("key", ["base_perplexity", "fingerprint", "study_id", "exhausted", "sweep"])
def test_attributes_of_the_study_that_others_wrote_are_one_message_at_most(
    tmp_path: Path, key: str, value: object
) -> None:
    config = make_config(tmp_path, n_trials=2)
    study = open_study(config, tmp_path)
    study.study.set_user_attr(key, value)
    view = StudyView(config.study)

    with suppress(LoraSearchError):
        base_of(view.attributes())
    with suppress(LoraSearchError):
        assert open_study(config, tmp_path).remember("base_perplexity", lambda: "14.2") in (
            14.2,
            5.0,
            -1.5,
            1.0,
        )

    assert view.rows()
    assert isinstance(find_identity(config.study), Identity)


def test_a_trial_whose_parameters_were_removed_fails_and_does_not_go_on_as_another(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_trials=3, sampler=SamplerConfig(name="random"))
    config.study.first_trial_is_default = False
    study = open_study(config, tmp_path)
    runs = study.claim(2)
    study.hand_back("interrupted")
    execute(
        tmp_path,
        "UPDATE trial_params SET param_value = 0.00123 WHERE trial_id = 1 AND param_name = 'optim.lr'",
    )
    execute(tmp_path, "DELETE FROM trial_params WHERE trial_id = 2")

    again = open_study(config, tmp_path)
    simulate(again)

    assert again.rows()[0].reason == "another program has changed its parameters"
    assert again.rows()[1].state in ("COMPLETE", "PRUNED") or again.rows()[1].reason
    assert len(runs) == 2
    assert again.summary().finished == 3
