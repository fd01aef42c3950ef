"""`lora-search confirm`: the best trials with fresh seeds, on the tiny random Llama."""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel

from lora_search import confirm, status
from lora_search.confirm import best_trials
from lora_search.errors import ConfigError
from lora_search.results.confirmation import Confirmation, read_confirmation
from lora_search.results.confirmation_text import verdicts
from lora_search.results.ranking import ranked
from lora_search.settings.schema import StudyConfig
from lora_search.study.study import SweepStudy
from tests.engine.test_engine import plain_perplexity
from tests.rows import make_row
from tests.test_answer import examples_of, plain_base

STUDY = StudyConfig(name="smoke")
CONFIRM = [
    sys.executable,
    "-m",
    "lora_search.confirm",
    "study.name=smoke",
    "confirm.top=2",
    "confirm.seeds=2",
]


def found_now() -> Confirmation:
    return read_confirmation(SweepStudy.read(STUDY)[1])


def values(found: Confirmation) -> dict[tuple[int, int], float | None]:
    return {(r.trial, r.seed): r.perplexity for r in found.repeats}


def test_the_best_trials_are_trained_again_with_fresh_seeds_and_compared(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = SweepStudy.read(STUDY)
    best = [row.number for row in ranked(rows)][:2]

    assert typed(confirm.main, "confirm.top=2", "confirm.seeds=2") == 0

    found, out = found_now(), " ".join(capsys.readouterr().out.split())
    assert sorted(values(found)) == sorted((trial, seed) for trial in best for seed in (1, 2))
    assert len({*values(found).values(), *(row.perplexity for row in rows)}) == 4 + len(
        rows
    )  # each is its own
    for (trial, seed), perplexity in values(found).items():
        adapted = PeftModel.from_pretrained(plain_base(), f"runs/smoke/confirm/{trial}-{seed}/adapter")
        assert plain_perplexity(adapted, examples_of("validation")) == pytest.approx(perplexity, rel=1e-5)
    assert [duel.num_seeds for duel in found.duels] == [2]
    assert found.confirmed_at
    assert f"trial {best[0]}, seed 2: perplexity" in out
    assert ("beyond doubt" in out) == found.duels[0].is_sure

    assert typed(confirm.main, "confirm.top=2", "confirm.seeds=2") == 0
    again = " ".join(capsys.readouterr().out.split())
    assert "4 runs, 4 of them trained before" in again
    assert values(found_now()) == values(found)

    assert typed(confirm.main, "confirm.top=2", "confirm.seeds=3") == 0
    assert "6 runs, 4 of them trained before" in " ".join(capsys.readouterr().out.split())
    assert values(found_now()).items() > values(found).items()
    verdict = verdicts(found_now(), rows)[0]
    assert html.escape(verdict) in Path("runs/smoke/report.html").read_text()
    assert typed(status.main) == 0
    assert verdict in " ".join(capsys.readouterr().out.split())


def copy_of(finished: Path, to: Path) -> Path:
    shutil.copytree(
        finished / "runs", to / "runs", ignore=shutil.ignore_patterns("confirm", "final", "export")
    )
    return to


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_gives_the_same_numbers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes hold every batch whole: where batches are cut, their sums are rounded in another order (1e-7)
    once other trials share the passes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*CONFIRM, "engine.tokens_per_pass=16384"]
    undisturbed, killed = copy_of(finished, tmp_path / "undisturbed"), copy_of(finished, tmp_path / "killed")
    for place in (undisturbed, killed):
        forget(place, monkeypatch)
    subprocess.run(command, cwd=undisturbed, check=True, env=environment, capture_output=True)
    for pattern in ("*/checkpoint/*", "*/adapter/adapter_model.safetensors"):
        process = subprocess.Popen(command, cwd=killed, env=environment, stdout=subprocess.DEVNULL)
        while not list((killed / "runs/smoke/confirm").glob(pattern)) and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "it came to its end before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=killed, check=True, env=environment, capture_output=True)

    monkeypatch.chdir(undisturbed)
    wanted = values(found_now())
    monkeypatch.chdir(killed)
    assert values(found_now()) == wanted
    assert len(wanted) == 4


def forget(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what other tests have confirmed out of a copy of the study."""
    monkeypatch.chdir(place)
    from lora_search.results.confirmation import store_confirmation

    store_confirmation(STUDY, Confirmation())


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["confirm.top=9"], "confirm.top: must be at most the number of complete trials, 4, got 9."),
        (["confirm.top=0"], "confirm.top: must be a whole number >= 1, got '0'."),
        (["confirm.top=all"], "confirm.top: must be a whole number >= 1, got 'all'."),
        (["confirm.seeds=0"], "confirm.seeds: must be a whole number >= 1, got '0'."),
        (["confirm.seeds=1"], "confirm.seeds: must be at least 2, got 1. One seed has no spread"),
        (["confirm.seeds=1000"], "confirm.top x confirm.seeds: must be at most 200, got 3000."),
        (["study.name=nobody"], "study.name: must be a study in study.storage, got 'nobody'."),
        (["confirm.tip=3"], "confirm"),
    ],
)
def test_wrong_confirmations_are_one_message(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert typed(confirm.main, *arguments) == 2

    assert message in " ".join(capsys.readouterr().out.split())


def test_two_confirmations_in_one_folder_do_not_write_over_each_other(
    typed: Callable[..., int], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_search.files.lock import alone

    with alone(finished / "runs/smoke/confirm", "test"):
        assert typed(confirm.main, "confirm.top=1", "confirm.seeds=2") == 1

    assert "another process does the same" in " ".join(capsys.readouterr().out.split())


def test_without_a_number_the_best_three_are_taken_or_as_many_as_are_complete() -> None:
    rows = [make_row(number) for number in range(5)]

    assert best_trials(rows, None, 3) == [0, 1, 2]
    assert best_trials(rows[:2], None, 3) == [0, 1]
    assert best_trials(rows, 5, 3) == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="no trial is complete yet"):
        best_trials([], None, 3)


def test_what_is_stored_is_json_that_reads_back(typed: Callable[..., int]) -> None:
    assert typed(confirm.main, "confirm.top=1", "confirm.seeds=2") == 0

    stored = json.loads(SweepStudy.read(STUDY)[1]["confirmation"])
    found = found_now()
    assert len(stored["repeats"]) == len(found.repeats)
    assert [r["perplexity"] for r in stored["repeats"]] == [r.perplexity for r in found.repeats]
