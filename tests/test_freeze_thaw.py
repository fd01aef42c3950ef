"""pruner=freeze_thaw as users run it: a sweep of the tiny model, its forecast, kills."""

import json
import sys
from pathlib import Path

import pytest

from lora_search import plan
from lora_search.search.trials import PAUSED
from lora_search.settings.schema import StudyConfig
from lora_search.study.study import SweepStudy
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow
from tests.commands import TINY, run_sweep
from tests.processes import kill_and_restart, moments

SWEEP = [*TINY, "pruner=freeze_thaw", "optim.lr=5e-3", "study.n_trials=8"]


def study_of(folder: Path) -> StudyConfig:
    return StudyConfig(name="smoke", storage=f"sqlite:///{folder}/runs/lora_search.db")


def rows_of(folder: Path) -> list[TrialRow]:
    return SweepStudy.read(study_of(folder))[0]


def test_a_sweep_pauses_trials_ends_by_itself_and_has_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_sweep(monkeypatch, tmp_path, *SWEEP)

    said, rows = capsys.readouterr().out, rows_of(tmp_path)
    assert code == 0
    assert "pruner=freeze_thaw chooses new settings too: no sampler draws them" in said
    assert "paused in favour of" in said
    assert {row.state for row in rows} == {"COMPLETE", "PRUNED"}
    assert len(rows) == 8
    best = min(rows, key=lambda row: row.perplexity or 1e9)
    settings = json.loads((tmp_path / "runs/smoke/best/settings.json").read_text())
    assert (best.state, settings["perplexity"]) == ("COMPLETE", best.perplexity)
    assert (tmp_path / "runs/smoke/best/adapter/adapter_model.safetensors").exists()
    assert "paused in favour of" in (tmp_path / "runs/smoke/report.html").read_text()
    assert not list(tmp_path.glob("runs/smoke/trials/*/checkpoint"))


def test_a_forecast_says_what_such_sweeps_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(sys, "argv", ["plan", *SWEEP, "study.n_trials=10"])

    assert plan.main() == 0

    found = json.loads((tmp_path / "runs/smoke.plan.json").read_text())
    shares = [tokens / 10 / found["trial_tokens"] for tokens in found["tokens"]]
    assert shares == pytest.approx([0.42, 0.67, 0.80])


def test_another_sampler_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep(monkeypatch, tmp_path, *SWEEP, "sampler=gp") == 2

    assert "sampler.name: draws nothing beside pruner=freeze_thaw, got 'gp'" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_comes_to_its_end(tmp_path: Path) -> None:
    command = [*SWEEP, "study.heartbeat_seconds=1", "study.max_retries=1000"]

    kills = kill_and_restart(tmp_path, command, moments(seed=0, count=6, until=4.0))

    rows = rows_of(tmp_path)
    assert kills > 0
    assert {row.state for row in rows} == {"COMPLETE", "PRUNED"}
    assert len(rows) == 8
    assert min(rows, key=lambda row: row.perplexity or 1e9).state == "COMPLETE"
    assert not any(row.is_paused for row in StudyView(study_of(tmp_path)).rows()), PAUSED
