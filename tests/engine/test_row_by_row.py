"""Bases whose rows must be kept apart: MPT runs them one by one, Qwen3.5 is packed but for its scans. What
packed passes promise holds for both."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_search.engine.evaluation import shareable_tokens
from lora_search.engine.generation import generate
from lora_search.ops.recompute import recompute_layers
from lora_search.trial import Measurement, TrialRun
from tests.conftest import make_run
from tests.engine.test_architectures import make_model
from tests.engine.test_engine import losses, perplexities, plain_peft_losses
from tests.harness import build_engine, random_splits, starting_adapter, train_all

SPLITS = random_splits(num_train=8, num_validation=3)
EVERYTHING = ("all-linear",)


@pytest.fixture(scope="module", params=["mpt", "qwen3_5_text"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_model(tmp_path_factory.mktemp("model") / request.param, request.param).path)


def runs(folder: Path) -> list[TrialRun]:
    return [
        make_run(folder, 0, target_modules=EVERYTHING, dropout=0.3, lr=1e-2),
        make_run(folder, 1, target_modules=EVERYTHING, r=2, batch_size=1, neftune_alpha=5.0, lr=1e-2),
        make_run(folder, 2, target_modules=EVERYTHING, dropout=0.1, batch_size=5, use_dora=True),
    ]


@pytest.fixture(scope="module")
def solo(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Measurement]]:
    return train_all(build_engine(base, SPLITS), runs(tmp_path_factory.mktemp("solo")))


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_slots_that_share_passes_have_the_curves_that_they_have_alone(
    base: Path, tmp_path: Path, solo: dict[int, list[Measurement]], is_recomputed: bool
) -> None:
    """Also with layers that are computed again in the backward pass, each row with its own dropout."""
    engine = build_engine(base, SPLITS, slots=3, tokens_per_pass=200)
    if is_recomputed:
        recompute_layers(engine.model.decoder)

    together = train_all(engine, runs(tmp_path))

    assert engine.model.is_row_by_row == (base.name == "mpt")
    for number, curve in solo.items():
        torch.testing.assert_close(losses(together[number]), losses(curve), rtol=1e-5, atol=0)
        torch.testing.assert_close(perplexities(together[number]), perplexities(curve), rtol=1e-5, atol=0)


def test_a_trajectory_is_that_of_plain_peft(base: Path, tmp_path: Path) -> None:
    engine = build_engine(base, SPLITS, tokens_per_pass=200)
    run = make_run(tmp_path, 0, target_modules=EVERYTHING, lr=1e-2, epochs=2)
    adapter = starting_adapter(engine, run, tmp_path / "start")
    engine.release([0])

    curve = train_all(engine, [run])[0]

    expected = plain_peft_losses(base, adapter, run, SPLITS)
    torch.testing.assert_close(losses(curve), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def test_nothing_is_computed_once_for_many_rows(base: Path) -> None:
    rows = [SPLITS.validation[0]] * 2

    assert shareable_tokens(build_engine(base, SPLITS).model, rows) == 0


@pytest.mark.parametrize("architecture", ["mpt", pytest.param("falcon_h1", marks=pytest.mark.slow)])
def test_answers_are_those_of_plain_peft(architecture: str, tmp_path: Path) -> None:
    folder = Path(make_model(tmp_path / "model", architecture).path)
    engine = build_engine(folder, SPLITS, slots=2)
    train_all(engine, [make_run(tmp_path, 0, target_modules=EVERYTHING, lr=5e-2)])
    prompts = [list(row.input_ids[: row.num_prompt_tokens + 2]) for row in SPLITS.validation]

    slot = engine.place(make_run(tmp_path, 0, target_modules=EVERYTHING).settings, tmp_path / "0" / "adapter")
    found = generate(engine.model, [slot], prompts, [2], 6, 10_000)[0]

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, str(tmp_path / "0" / "adapter"))
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in answer:
            with torch.no_grad():
                assert int(tuned(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)
