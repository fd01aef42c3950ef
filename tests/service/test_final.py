"""`lora-search final`: the winner's settings on the rows that score trials as well; no score of its own."""

import html
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel

from lora_search import final
from lora_search.data.store import lengths_of
from lora_search.files.peft import read_peft
from lora_search.results.ranking import best_of
from lora_search.results.verdict import line_of_final
from lora_search.service.final import with_more
from lora_search.settings.schema import StudyConfig
from lora_search.study.stored_results import read_finals
from lora_search.study.study import SweepStudy
from lora_search.trial import TrialRow
from tests.engine.test_engine import plain_perplexity
from tests.harness import random_splits
from tests.test_answer import examples_of, plain_base

STUDY = StudyConfig(name="smoke")


def study_now() -> tuple[TrialRow, dict[str, str]]:
    rows, attributes = SweepStudy.read(STUDY)
    best = best_of(rows)
    assert best is not None
    return best, attributes


def test_the_rows_of_further_splits_follow_those_of_the_training_split() -> None:
    splits = random_splits(num_train=5, num_validation=3)

    wider = with_more(splits, ("train", "validation"))

    assert list(wider.train) == [*splits.train, *splits.validation]
    assert list(lengths_of(wider.train)) == [len(row.input_ids) for row in wider.train]
    assert wider.validation is splits.validation
    assert list(with_more(splits, ("train", "validation", "test")).train) == list(
        wider.train
    )  # none are there


def test_it_learns_the_validation_rows_too_and_says_that_it_has_no_score(
    typed: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, _ = study_now()
    assert best.perplexity is not None

    assert typed(final.main, f"to={tmp_path}/final") == 0

    adapted = PeftModel.from_pretrained(plain_base(), f"{tmp_path}/final")
    assert plain_perplexity(adapted, examples_of("validation")) < 0.99 * best.perplexity  # it has seen them
    _, note = read_peft(tmp_path / "final")
    assert note["rung"] == best.best_rung
    card = (tmp_path / "final/README.md").read_text()
    assert "- no score of its own: it was trained on 32 rows (train and validation)" in card
    assert f"it repeats trial {best.number} (seed 1)" in card
    made = read_finals(study_now()[1])[-1]
    assert (made.trial, made.num_rows, made.splits) == (best.number, 32, ("train", "validation"))
    assert "it has no score of its own" in " ".join(capsys.readouterr().out.split())
    assert html.escape(line_of_final(made)[1:]) in Path("runs/smoke/report.html").read_text()
    assert not list(Path("runs/smoke/final").glob("*/*"))  # what it was trained in is gone

    assert typed(final.main, f"to={tmp_path}/final") == 2
    assert "to: must be a new or empty folder" in " ".join(capsys.readouterr().out.split())


def test_all_rows_and_several_seeds_are_merged_each_on_its_own(
    typed: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(final.main, "rows=all", "seeds=2", "merge=true", "trial=1", f"to={tmp_path}/all") == 0

    out = capsys.readouterr().out
    made = [one for one in read_finals(study_now()[1]) if one.folder.startswith(f"{tmp_path}/all")]
    assert [(one.seed, one.num_rows, one.trial) for one in made] == [(1, 24 + 8 + 65, 1), (2, 24 + 8 + 65, 1)]
    assert out.count("merged weights in plain transformers, float32: validation perplexity") == 2
    weights = [(tmp_path / f"all/seed-{seed}/model.safetensors").read_bytes() for seed in (1, 2)]
    assert weights[0] != weights[1]


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows=test"], "rows: must be one of train+validation, all, got 'test'."),
        (["seeds=0"], "seeds: must be a whole number >= 1, got '0'."),
        (["seeds=51"], "seeds: must be at most 50, got 51."),
        (["trial=44"], "trial: must be a trial that has a perplexity, got '44'."),
        (["merge=1"], "merge: must be true or false, got '1'."),
        (["to=runs/smoke"], "to: must be a new or empty folder, got 'runs/smoke'."),
        (["study.name=nobody"], "study.name: must be a study in study.storage, got 'nobody'."),
        (["row=all"], "row: this command has no such key. Did you mean rows?"),
    ],
)
def test_wrong_finals_are_one_message_and_write_nothing(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert typed(final.main, *arguments) == 2

    assert message in " ".join(capsys.readouterr().out.split())
    assert not Path("runs/smoke/export").exists()
