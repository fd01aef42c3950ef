"""Every state of a trial, with and without measurements, in every view: nothing breaks or is left out."""

import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console

from lora_search.output.best_folder import export_best
from lora_search.output.conclusion import conclude
from lora_search.output.leaderboard import leaderboard
from lora_search.output.terminal import Progress
from lora_search.page.charts import learning_curves, parameter_chart
from lora_search.page.report import write_report
from lora_search.results.ranking import best_of
from lora_search.results.record import StudyRecord
from lora_search.search.trials import PAUSED, PROGRESS, settled, trial_rows
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow
from tests.conftest import SETTINGS
from tests.output.test_tracking import make_run, settings, summary, wandb_files
from tests.output.test_tracking import measure as measured
from tests.rows import ATTRIBUTES, BASE_PERPLEXITY
from tests.study.test_study import SPACE, make_config, open_study

CURVES: dict[str, Mapping[int, float]] = {
    "unmeasured": {},
    "one": {1: 9.5},
    "two": {1: 9.5, 2: 8.5},
    "nan": {1: math.nan},
    "infinite": {1: math.inf, 2: 9.0},
    "odd": {0: 9.0, 70: 0.0},
}
STATES = ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING", "PAUSED"]


def trial_of(state: str, curve: Mapping[int, float]) -> FrozenTrial:
    is_paused = state == "PAUSED"
    begun = {"settings": json.dumps(asdict(SETTINGS)), "worker": "elsewhere:1:1", PAUSED: is_paused}
    progress = {"best_rung": max(curve, default=None), "examples_seen": 10 * len(curve), "train_tokens": 7}
    return create_trial(
        state=TrialState.RUNNING if is_paused else TrialState[state],
        value=8.5 if state == "COMPLETE" else None,
        intermediate_values=dict(curve),
        user_attrs={**begun, "reason": "a reason"},
        system_attrs={PROGRESS: progress} if curve else {},
    )


def row_of(state: str, curve: Mapping[int, float]) -> TrialRow:
    (row,) = trial_rows([settled(trial_of(state, curve))])
    return replace(row, params={"lora.r": 8})


def text_of_board(row: TrialRow, folder: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(leaderboard(StudyRecord([row], ATTRIBUTES, folder), 200))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def page(row: TrialRow, folder: Path) -> str:
    return write_report(StudyRecord([row], ATTRIBUTES, folder)).read_text()


def concluded(row: TrialRow, folder: Path) -> str:
    lines = io.StringIO()
    config = SweepConfig(study=StudyConfig(name="faq"), runs_dir=str(folder), space=SPACE)
    conclude(StudyRecord([row], ATTRIBUTES, folder / "faq"), config, Progress(Console(file=lines, width=200)))
    return lines.getvalue()


def charts(row: TrialRow, folder: Path) -> str:
    best = best_of([row])
    return learning_curves([row], best, BASE_PERPLEXITY, 4) + parameter_chart([row], best, 14.2, "lora.r")


def exported(row: TrialRow, folder: Path) -> str:
    return str(export_best(StudyRecord([row], ATTRIBUTES, folder)))


VIEWS = [text_of_board, page, concluded, charts, exported]
CASES = [(state, curve, view) for state in STATES for curve in CURVES for view in VIEWS]
QUICK = [c for c in CASES if c[2] not in (page, concluded) or c[1] in ("unmeasured", "two")]
THOROUGH = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case not in QUICK]


@pytest.mark.parametrize(("state", "curve", "view"), [*QUICK, *THOROUGH])
def test_every_state_is_shown_in_every_view(
    tmp_path: Path, state: str, curve: str, view: Callable[[TrialRow, Path], str]
) -> None:
    row = row_of(state, CURVES[curve])

    shown = view(row, tmp_path)

    word = {"PAUSED": "pruned"}.get(state, state.lower())
    has_begun = state != "WAITING" or bool(CURVES[curve])
    assert (word in shown) == has_begun or view in (charts, exported, page)
    assert f'class="state {row.state}"' in shown or view is not page or not has_begun


def test_an_interrupted_trial_is_drawn_and_named_in_the_legend() -> None:
    drawn = learning_curves([row_of("WAITING", CURVES["two"])], None, BASE_PERPLEXITY, 4)

    assert '<g class="mark waiting"' in drawn
    assert "waiting: perplexity" in drawn


def test_a_trial_that_was_only_told_complete_is_not_the_best_anywhere(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    study.study.add_trial(trial_of("COMPLETE", {}))
    view = StudyView(study.config.study)

    assert view.summary().best_number is None
    assert best_of(view.rows()) is None


def test_a_study_with_every_state_is_read(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path), tmp_path)
    study.study.add_trials([trial_of(state, curve) for state in STATES for curve in CURVES.values()])
    view = StudyView(study.config.study)

    rows, slots, found = view.rows(), view.slots(), view.summary()
    lines = io.StringIO()
    Progress(Console(file=lines, width=300), clock=lambda: 1e9).update(slots, found, 1.0)

    assert [row.state for row in rows[1:]] == [
        {"PAUSED": "PRUNED"}.get(state, state) for state in STATES for _ in CURVES
    ]
    assert (found.complete, found.pruned, found.failed, found.running) == (6, 12, 6, 6)
    assert len(slots) == len(CURVES)
    assert (found.best_number, found.best_perplexity) == (2, 8.5)
    assert "18/8 trials" in lines.getvalue()


@pytest.mark.slow
def test_the_summary_of_wandb_has_every_end_with_and_without_measurements(tmp_path: Path) -> None:
    from lora_search.output.tracking import make_tracker

    ends = ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING", "INTERRUPTED"]
    tracker = make_tracker(settings(), {"model": "tiny"})
    for number, state in enumerate([*ends, *ends]):
        tracker.start(make_run(tmp_path, number))
        if number < len(ends):
            tracker.log(measured(number, 1, 9.5))
        tracker.finish(number, state, "a reason")
    tracker.close()

    stored = [summary(wandb_files(tmp_path, number)[0]) for number in range(2 * len(ends))]
    assert [s["state"] for s in stored] == [*ends, *ends]
    assert [s.get("best_perplexity") for s in stored] == [9.5] * len(ends) + [None] * len(ends)
