"""The commands after a search on a machine whose disk never had the trials: it shares database and copies."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_search import confirm, export, final, generate, report, score
from lora_search.files.peft import read_peft
from lora_search.files.row_scores import read_scores, write_scores
from lora_search.results.certainty import certainty_of
from lora_search.results.confirmation import read_confirmation
from lora_search.results.ranking import best_of
from lora_search.settings.schema import StudyConfig
from lora_search.study.view import StudyView
from tests.commands import SMOKE, run_sweep

COMMANDS = [
    (export.main, ["trial=0"], "export/trial-0/tokenizer.json"),
    (export.main, ["merge=true"], "export/trial-{best}-merged/tokenizer.json"),
    (score.main, ["--again"], "trials/{best}/test_rows.npz"),
    (
        generate.main,
        ["trials=1,3", "max_new_tokens=4", "What is ROT?"],
        "trials/3/adapter/adapter_config.json",
    ),
    (final.main, [], "export/final-trial-{best}/tokenizer.json"),
]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a sweep ran, with the copies of its files in `copies`."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        copies = f"artifacts.uri={folder}/copies"
        assert run_sweep(patch, folder, *SMOKE, copies, "study.sample_answers=1") == 0
    return folder


@pytest.fixture
def finished(searched: Path, tmp_path: Path) -> Path:
    """A folder with the database alone, and copies that a test may change."""
    (tmp_path / "runs").mkdir()
    for file in (searched / "runs").glob("lora_search.db*"):
        shutil.copy(file, tmp_path / "runs")
    shutil.copytree(searched / "copies", tmp_path / "copies")
    return tmp_path


def best_number() -> int:
    best = best_of(StudyView(StudyConfig(name="smoke")).rows())
    assert best is not None
    return best.number


def test_the_report_is_the_same_as_where_the_trials_ran(
    typed: Callable[..., int], searched: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = f"artifacts.uri={finished}/copies"

    assert typed(report.main, "--format=md", copies) == 0
    said = capsys.readouterr().out
    assert typed(report.main, copies) == 0  # the folder is the study's

    rows = StudyView(StudyConfig(name="smoke")).rows()
    here, there = (certainty_of(rows, place / "runs/smoke") for place in (finished, searched))
    assert len(there.against_best) == 3
    assert here == there
    assert "fetching what this machine lacks of 4 trials" in said
    assert "fetching" not in capsys.readouterr().out
    assert "Sample answers" in (finished / "runs/smoke/report.html").read_text(encoding="utf-8")
    assert not (finished / "runs/smoke/trials/0/adapter").exists()


@pytest.mark.parametrize(("main", "arguments", "made"), COMMANDS)
def test_a_command_brings_what_it_needs(
    main: Callable[[], int], arguments: list[str], made: str, typed: Callable[..., int], finished: Path
) -> None:
    best = best_number()

    assert typed(main, *arguments, f"artifacts.uri={finished}/copies") == 0

    assert (finished / "runs/smoke" / made.format(best=best)).is_file()


def test_an_adapter_of_an_earlier_rung_is_not_exported(
    typed: Callable[..., int], searched: Path, finished: Path
) -> None:
    trial = finished / "runs/smoke/trials/2"  # it began here, and another machine went on
    shutil.copytree(searched / "runs/smoke/trials/2", trial)
    (trial / ".artifacts.json").write_text('{"rung": 1, "files": {}}')
    (trial / "adapter/adapter_model.safetensors").write_bytes(b"of rung 1")
    scores = read_scores(trial)
    assert scores is not None
    write_scores(trial, scores[0], 1)
    shutil.copy(searched / "runs/smoke/study.json", finished / "runs/smoke")

    assert typed(export.main, "trial=2", f"artifacts.uri={finished}/copies") == 0

    name = "adapter_model.safetensors"
    exported = (finished / "runs/smoke/export/trial-2" / name).read_bytes()
    assert exported == (searched / "runs/smoke/trials/2/adapter" / name).read_bytes()
    assert read_peft(trial / "adapter")


def test_without_copies_the_adapter_is_asked_for_in_one_message(
    typed: Callable[..., int], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished / "copies")

    assert typed(export.main, "trial=1", f"artifacts.uri={finished}/copies") == 1

    assert "trial 1: its adapter is not in runs/smoke/trials/1/adapter, nor at artifacts.uri" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_final_adapter_gets_its_tokenizer_without_copies_too(
    typed: Callable[..., int], searched: Path, finished: Path
) -> None:
    best = best_number()

    assert typed(final.main, "artifacts.uri=null") == 0

    made = finished / "runs/smoke/export" / f"final-trial-{best}"
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (made / name).read_bytes() == (searched / "runs/smoke/tokenizer" / name).read_bytes()


def test_a_place_that_fails_is_one_line_and_the_report_is_written(
    typed: Callable[..., int], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(report.main, "artifacts.uri=nosuch://bucket/x") == 0

    assert "artifacts.uri: must be a URI that fsspec opens" in " ".join(capsys.readouterr().out.split())
    assert typed(report.main, "artifacts.uri=null") == 0  # the folder is the study's by now
    assert (finished / "runs/smoke/report.html").is_file()


def test_what_another_machine_has_confirmed_is_compared_and_not_trained_again(
    typed: Callable[..., int], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["confirm.top=2", "confirm.seeds=2", f"artifacts.uri={finished}/copies"]
    assert typed(confirm.main, *command) == 0
    there = read_confirmation(StudyView(StudyConfig(name="smoke")).attributes())
    shutil.rmtree(finished / "runs/smoke")
    capsys.readouterr()

    assert typed(confirm.main, *command) == 0

    here = read_confirmation(StudyView(StudyConfig(name="smoke")).attributes())
    assert "4 runs, 4 of them trained before" in " ".join(capsys.readouterr().out.split())
    assert here.repeats == there.repeats
    assert here.duels == there.duels
    assert len(here.duels) == 1
