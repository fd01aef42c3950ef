"""A study's own W&B runs, read back: every number is the study's."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from lora_search.files.row_scores import write_scores
from lora_search.output.tracking import Tracker, make_tracker
from lora_search.output.tracking_study import track_confirmation, track_study
from lora_search.results.confirmation import Confirmation, Duel, Repeat
from lora_search.results.record import StudyRecord
from lora_search.settings.overlay import trial_settings
from lora_search.trial import AnswerScore, RowScores
from tests.output.test_tracking import (
    history,
    make_run,
    measure,
    read_records,
    settings,
    summary,
    values_of,
    wandb_files,
)
from tests.rows import ATTRIBUTES, BASE_PERPLEXITY, BEST, ROWS

ENDED = [replace(row, state="PRUNED") if row.state == "RUNNING" else row for row in ROWS]
KNOWN = {**ATTRIBUTES, "study_id": "abc", "settings": json.dumps({"seed": 3}), "peak_memory_bytes": "123456"}


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """The .wandb files of a study that is through, by the kind of run."""
    track_study(settings(), StudyRecord(ENDED, KNOWN, tmp_path))
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    return {next(r.run.job_type for r in read_records(f) if r.HasField("run")): f for f in files}


def test_the_base_is_a_level_line_as_far_as_any_trial_went(runs: dict[str, Path]) -> None:
    line = {"validation/perplexity": BASE_PERPLEXITY, "validation/loss": math.log(BASE_PERPLEXITY)}

    assert sorted(runs) == ["base", "study"]
    assert history(runs["base"]) == [{"examples_seen": 0, **line}, {"examples_seen": 1200, **line}]


def test_the_summary_has_the_figures_of_the_study(runs: dict[str, Path]) -> None:
    stored = summary(runs["study"])

    assert (stored["best_trial"], stored["best_perplexity"]) == (BEST.number, BEST.perplexity)
    assert stored["base_perplexity"] == BASE_PERPLEXITY
    assert stored["change_percent"] == 100 * (8.5 / 14.2 - 1)
    assert stored["train_tokens"] == sum(row.train_tokens for row in ENDED)
    assert (stored["trials"], stored["pruned"], stored["peak_memory_bytes"]) == (16, 9, 123456)


def test_the_leaderboard_is_a_table_of_unrounded_numbers(runs: dict[str, Path]) -> None:
    (table,) = runs["study"].parent.glob("files/media/table/leaderboard_*.table.json")
    found = json.loads(table.read_text())

    rows = {row[0]: dict(zip(found["columns"], row, strict=True)) for row in found["data"]}
    assert list(rows)[:3] == ["base", "5", "4"]
    assert rows["base"]["perplexity"] == BASE_PERPLEXITY
    assert len(rows) == 17
    for row in ENDED:
        shown = rows[str(row.number)]
        told = (shown["perplexity"], shown["best_rung"], shown["train_tokens"], shown["train_seconds"])
        assert told == (row.perplexity, row.best_rung, row.train_tokens, row.train_seconds)
        assert shown["optim.lr"] == str(row.params["optim.lr"])
    assert (rows["5"]["state"], rows["7"]["state"]) == ("best", "pruned")


def test_it_says_where_the_rest_is_and_holds_no_password(runs: dict[str, Path]) -> None:
    run = next(r.run for r in read_records(runs["study"]) if r.HasField("run"))
    config = values_of(run.config.update)

    assert "report.html" in run.notes
    assert "postgresql://me:***@host/db" in run.notes
    assert (run.run_id, run.run_group, list(run.tags)) == ("faq.v2-abc-study", "faq.v2", ["study"])
    assert (config["git_commit"], config["data.train"], config["seed"]) == ("5cec805", "402", 3)
    assert not any(b"S3CRET" in path.read_bytes() for path in runs.values())


def test_the_best_adapter_goes_along_when_it_is_asked_for(tmp_path: Path) -> None:
    adapter = tmp_path / "best/adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    config = settings()
    config.tracker.log_adapter = True

    track_study(config, StudyRecord(ENDED, KNOWN, tmp_path))

    records = [r for f in tmp_path.glob("wandb/offline-run-*/*.wandb") for r in read_records(f)]
    (artifact,) = [r.artifact for r in records if r.HasField("artifact") and r.artifact.type == "adapter"]
    assert artifact.name == "faq.v2-best"
    assert [entry.path for entry in artifact.manifest.contents] == ["adapter_config.json"]


def test_a_study_that_goes_on_or_is_not_tracked_writes_nothing(tmp_path: Path) -> None:
    track_study(settings(), StudyRecord(ROWS, KNOWN, tmp_path))
    track_study(settings("none"), StudyRecord(ENDED, KNOWN, tmp_path))

    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tracker() -> Tracker:
    return make_tracker(settings(), {})


def test_a_curve_starts_at_the_base_and_ends_with_its_change(tmp_path: Path, tracker: Tracker) -> None:
    tracker.begin(10.0, {"git_commit": "abc", "data.train": "402"})
    tracker.start(make_run(tmp_path))
    tracker.start(replace(make_run(tmp_path, 1), perplexities={1: 9.0}))  # resumed: it began elsewhere
    for number in (0, 1):
        tracker.log(measure(number, 2, 8.0))
        tracker.finish(number, "PRUNED", "rung 2")
    tracker.close()

    (fresh,), (resumed,) = wandb_files(tmp_path, 0), wandb_files(tmp_path, 1)
    first = {"examples_seen": 0, "validation/perplexity": 10.0, "validation/loss": math.log(10.0)}
    assert history(fresh)[0] == first
    assert first not in history(resumed)
    assert summary(fresh)["change_percent"] == pytest.approx(-20.0)
    config = values_of(next(r.run for r in read_records(fresh) if r.HasField("run")).config.update)
    assert (config["git_commit"], config["data.train"]) == ("abc", "402")


def test_runs_are_tagged_by_what_they_are(tmp_path: Path, tracker: Tracker) -> None:
    as_given = replace(make_run(tmp_path), settings=trial_settings(settings(), {}))
    tracker.start(as_given)
    tracker.start(make_run(tmp_path, 1))
    tracker.finish(0, "PRUNED", "rung 1")
    tracker.finish(1, "COMPLETE", "")
    tracker.close()

    tags = [
        list([r.run for r in read_records(wandb_files(tmp_path, number)[0]) if r.HasField("run")][-1].tags)
        for number in (0, 1)
    ]
    assert tags == [["default", "pruned"], []]


def test_best_and_tied_trials_are_tagged_and_keep_their_numbers(tmp_path: Path) -> None:
    tokens, wobble = np.full(40, 25), np.tile([5.0, -5.0], 20)
    score = AnswerScore(name="rouge_l", score=31.25, base=20.5, num_rows=8, behind=None, chooses=False)
    near = replace(ENDED[4], perplexity=BEST.perplexity * math.exp(0.2 / 25), metric=score)
    far = replace(ENDED[3], perplexity=BEST.perplexity * math.exp(9.0 / 25))
    for row, shift, noise in ((BEST, 0.0, 0.0), (near, 0.2, wobble), (far, 9.0, wobble)):
        nll = tokens * math.log(BEST.perplexity or 0) + shift + noise
        write_scores(tmp_path / f"trials/{row.number}", RowScores(nll, tokens), row.best_rung or 0)

    track_study(settings(), StudyRecord([*ENDED[:3], far, near, *ENDED[5:]], KNOWN, tmp_path))

    files = {path.parts[-4]: path for path in tmp_path.glob("trials/*/wandb/offline-run-*/*.wandb")}
    runs = {number: next(r.run for r in read_records(f) if r.HasField("run")) for number, f in files.items()}
    assert {number: list(run.tags) for number, run in runs.items()} == {"5": ["best"], "4": ["tied"]}
    assert runs["4"].run_id == "faq.v2-abc-4"
    config, stored = values_of(runs["4"].config.update), summary(files["4"])
    assert (config["trial"], config["r"], config["lr"]) == (4, near.params["lora.r"], near.params["optim.lr"])
    assert (stored["best_perplexity"], stored["best_rung"], stored["rouge_l"]) == (near.perplexity, 12, 31.25)
    assert stored["change_percent"] == 100 * ((near.perplexity or 0) / BASE_PERPLEXITY - 1)
    assert history(files["4"]) == []


def test_the_scores_of_answers_are_in_leaderboard_and_summary(tmp_path: Path) -> None:
    def scored(number: int) -> AnswerScore:
        return AnswerScore(
            name="rouge_l", score=30.0 + number / 7, base=20.5, num_rows=8, behind=None, chooses=False
        )

    rows = [replace(row, metric=scored(row.number)) if row.state == "COMPLETE" else row for row in ENDED]

    track_study(settings(), StudyRecord(rows, KNOWN, tmp_path))

    (run,) = [f for f in tmp_path.glob("wandb/*/*.wandb") if "study" in f.name]
    (table,) = run.parent.glob("files/media/table/leaderboard_*.table.json")
    found = json.loads(table.read_text())
    column = {row[0]: row[found["columns"].index("rouge_l")] for row in found["data"]}
    assert column["base"] == 20.5
    assert {number: column[str(number)] for number in range(6)} == {n: 30.0 + n / 7 for n in range(6)}
    assert column["7"] is None
    stored = summary(run)
    told = [stored[f"metric{part}"] for part in ("", "_base", "_best", "_rows")]
    assert told == ["rouge_l", 20.5, 30.0 + 5 / 7, 8]


def test_a_confirmation_has_a_run_with_every_seed_and_its_verdict(tmp_path: Path) -> None:
    repeats = [
        Repeat(
            trial=n,
            seed=seed,
            perplexity=8.5 + n / 70 + seed / 9,
            rung=11,
            train_tokens=70,
            train_seconds=3.25,
        )
        for n in (4, 5)
        for seed in (1, 2)
    ]
    duel = Duel(
        leader=4, other=5, difference=0.03, row_error=0.001, seed_error=0.002, critical=4.3,
        num_rows=20, num_seeds=2,
    )  # fmt: skip
    stored = Confirmation(repeats=tuple(repeats), duels=(duel,), confirmed_at="2026-11-26T12:00:00+00:00")
    known = {**KNOWN, "confirmation": json.dumps(asdict(stored))}

    track_confirmation(settings(), StudyRecord(ENDED, known, tmp_path))

    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    tables = run.parent / "files/media/table"
    (seeds,), (duels,) = tables.glob("repeats_*.json"), tables.glob("comparisons_*.json")
    assert json.loads(seeds.read_text())["data"] == [
        [r.trial, r.seed, r.perplexity, 11, 70, 3.25] for r in repeats
    ]
    assert json.loads(duels.read_text())["data"] == [
        [4, 5, 100 * duel.change, 100 * duel.change_error, True, 2, 20]
    ]
    told = summary(run)
    assert "Trial 4 is better than trial 5 beyond doubt" in told["verdict"]
    assert told["mean_perplexity/trial_4"] == stored.fresh()[0].mean
