"""What follows a search: test score, export, answers, confirmation. One finished smoke sweep serves all."""

import json
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_search import score, sweep
from lora_search.data.rows import Example
from lora_search.errors import FingerprintError
from lora_search.model.loading import load_tokenizer, resolve_model
from lora_search.output.ranking import best_of
from lora_search.reopen import reopen
from lora_search.settings.recorded import recorded_config
from lora_search.settings.schema import ModelConfig, StudyConfig
from lora_search.study.results import read_test_score
from lora_search.study.study import SweepStudy
from lora_search.trial import TrialRow
from tests.engine.test_engine import plain_perplexity

TINY = ModelConfig(path="tiny-llama")
STUDY = StudyConfig(name="smoke")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished smoke sweep."""
    folder = tmp_path_factory.mktemp("answer")
    arguments = ["-cn", "smoke", "engine.device=cpu", "study.n_trials=4", "optim.lr=5e-3", "pruner=none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["sweep", *arguments])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            assert sweep.main() == 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    return folder


@pytest.fixture
def typed(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs a command's main as if it was typed where the sweep ran."""
    monkeypatch.chdir(finished)

    def run(main: Callable[[], int], *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["command", "study.name=smoke", *arguments])
        return main()

    return run


def study_now() -> tuple[TrialRow, dict[str, str]]:
    """Return the best trial and the attributes of the study in this folder."""
    rows, attributes = SweepStudy.read(STUDY)
    best = best_of(rows)
    assert best is not None
    return best, attributes


def examples_of(split: str) -> tuple[Example, ...]:
    """Return the rows of a split in plain tokens, from the text that the sweep wrote."""
    tokenizer = load_tokenizer(resolve_model(TINY), TINY)
    pairs = [json.loads(line) for line in Path(f"runs/smoke/data/{split}.jsonl").read_text().splitlines()]
    tokens = [(tokenizer(p["prompt"])["input_ids"], tokenizer(p["completion"])["input_ids"]) for p in pairs]
    return tuple(Example(tuple((prompt + completion)[:128]), len(prompt)) for prompt, completion in tokens)


def plain_base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        resolve_model(TINY), attn_implementation="eager", dtype=torch.float32
    )


def test_a_sweep_ends_with_one_look_at_the_test_split(typed: Callable[..., int]) -> None:
    best, attributes = study_now()

    found = read_test_score(attributes)

    assert found is not None
    assert (found.trial, found.rung, found.looks) == (best.number, best.best_rung, 1)
    rows = examples_of("test")
    assert found.num_rows == len(rows) > 50
    assert found.base_perplexity == pytest.approx(plain_perplexity(plain_base(), rows), rel=1e-5)
    adapted = PeftModel.from_pretrained(plain_base(), f"runs/smoke/trials/{best.number}/adapter")
    assert found.perplexity == pytest.approx(plain_perplexity(adapted, rows), rel=1e-5)
    assert datetime.fromisoformat(found.scored_at) <= datetime.now(UTC)


def test_a_second_look_is_refused_unless_it_is_asked_for_and_then_counted(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = read_test_score(study_now()[1])
    assert first is not None

    assert typed(score.main) == 2
    refused = " ".join(capsys.readouterr().out.split())
    assert read_test_score(study_now()[1]) == first
    assert typed(score.main, "--again") == 0

    second = read_test_score(study_now()[1])
    assert second is not None
    assert "add --again" in refused
    assert first.scored_at in refused
    assert second.looks == first.looks + 1
    assert second.earlier[-1] == (first.trial, first.perplexity, first.scored_at)
    assert second.perplexity == pytest.approx(first.perplexity, rel=1e-6)


def test_a_study_whose_rows_changed_since_is_refused(typed: Callable[..., int]) -> None:
    _, attributes = study_now()
    config = recorded_config(attributes, STUDY)
    config.data.validation_fraction = 0.2

    with pytest.raises(FingerprintError, match="validation rows changed"):
        reopen(config, [], 1)
