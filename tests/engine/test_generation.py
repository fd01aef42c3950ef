"""Several slots answer at once over the packed base, as each would alone in plain PEFT."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_search.engine.engine import Engine
from lora_search.engine.evaluation import score_rows
from lora_search.engine.generation import generate
from lora_search.files.peft import BaseRecord, export_peft
from tests.conftest import make_run
from tests.harness import build_engine, random_splits, train_all

SPLITS = random_splits(num_validation=6)
PROMPTS = [list(row.input_ids[: row.num_prompt_tokens + 2]) for row in SPLITS.validation]
ENDS = [2]


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Path]:
    """Return an engine with three strong adapters in its slots, which are also in PEFT's files."""
    folder = tmp_path_factory.mktemp("adapters")
    engine = build_engine(tiny_llama, SPLITS, slots=3)
    runs = [make_run(folder, number, r=2 * number + 2, alpha=9.0 - number) for number in range(3)]
    engine.admit(runs)
    generator = torch.Generator().manual_seed(0)
    for number, run in enumerate(runs):
        slot, row = engine.slots[number], engine.bank.rows[number]
        assert slot is not None
        row.theta[0].normal_(std=0.3, generator=generator)
        engine.bank.refresh(number)
        weights = row.layout.tensors(row.theta)
        export_peft(
            weights, run.settings, slot.names, BaseRecord(path=str(tiny_llama)), folder / str(number) / "out"
        )
    return engine, folder


def plain_answers(folder: Path, adapter: Path | None) -> list[list[int]]:
    """Return the greedy answers of a loop over the logits, one prompt at a time, without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    answers = []
    for prompt in PROMPTS:
        ids: list[int] = []
        while len(ids) < 9:
            with torch.no_grad():
                token = int(model(torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax())
            if token in ENDS:
                break
            ids.append(token)
        answers.append(ids)
    return answers


@pytest.mark.parametrize("tokens_per_pass", [1, 200, 10_000])
def test_each_slot_answers_as_its_adapter_does_alone(
    packed: tuple[Engine, Path], tiny_llama: Path, tokens_per_pass: int
) -> None:
    engine, folder = packed
    passes = []

    found = generate(
        engine.model, [2, None, 0], PROMPTS, ENDS, 9, tokens_per_pass, after_pass=lambda: passes.append(1)
    )

    adapters = [folder / "2/out", None, folder / "0/out"]
    assert found == [plain_answers(tiny_llama, adapter) for adapter in adapters]
    assert found[0] != found[1] != found[2] != found[0]
    assert len(passes) == {1: 6, 200: 3, 10_000: 1}[tokens_per_pass]


def test_scores_and_training_are_the_same_after_answering(
    packed: tuple[Engine, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    engine, _ = packed
    before = score_rows(engine.model, (0, 1), SPLITS.validation, 1000)

    generate(engine.model, [1, 2], PROMPTS, ENDS, 4, 1000)

    after = score_rows(engine.model, (0, 1), SPLITS.validation, 1000)
    assert [one.perplexity for one in after] == [one.perplexity for one in before]
    fresh, used = build_engine(tiny_llama, SPLITS, slots=2), build_engine(tiny_llama, SPLITS, slots=2)
    generate(used.model, [None], PROMPTS, ENDS, 4, 1000)
    curves = [train_all(one, [make_run(tmp_path / name, 0)])[0] for one, name in ((fresh, "a"), (used, "b"))]
    assert [m.perplexity for m in curves[0]] == [m.perplexity for m in curves[1]]
