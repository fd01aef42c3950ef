"""Trained rows of the embedding, and of a head tied to it, against plain PEFT's `trainable_token_indices`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lora_search.engine.build import Room, require_exact
from lora_search.engine.effect_checks import check_outline
from lora_search.engine.generation import generate
from lora_search.errors import ConfigError, ModelError
from lora_search.model.embedding import check_tokens
from lora_search.ops.nll import CPU_ROWS, Head
from lora_search.ops.tokens import Tokens
from lora_search.settings.schema import EngineConfig, ModelConfig, SweepConfig
from tests.conftest import make_run
from tests.engine.test_architectures import make_model
from tests.engine.test_options import SPLITS, exported_perplexity, losses, plain_base, plain_losses
from tests.harness import build_engine, starting_adapter, train_all

OPTIONS = {"trainable_token_indices": (7, 40, 5), "label_smoothing": 0.1, "target_modules": ("all-linear",)}


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "granite", "qwen2"])
def test_embedding_and_tied_head_train_as_in_peft(architecture: str, tmp_path: Path) -> None:
    """Gemma 2 caps its logits, Gemma 3's embedding scales its rows, Granite scales both."""
    config = make_model(tmp_path / "model", architecture, tie_word_embeddings=True)
    check_outline(config.path, config, [("all-linear",)], tokens=[((7, 40, 5), False)])
    run, folder = make_run(tmp_path, 0, alpha=6.0, lr=5e-3, **OPTIONS), tmp_path / "model"
    start = starting_adapter(build_engine(folder, SPLITS), run, tmp_path / "start")
    model = PeftModel.from_pretrained(plain_base(folder), str(start), is_trainable=True)
    expected = plain_losses(model, run, SPLITS)

    curve = train_all(build_engine(folder, SPLITS), [run])[0]

    torch.testing.assert_close(losses(curve), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert exported_perplexity(folder, tmp_path) == pytest.approx(curve[-1].best_perplexity, rel=1e-5)
    other = replace(
        run, settings=replace(run.settings, trainable_token_indices=()), folder=str(tmp_path / "1")
    )
    without = train_all(build_engine(folder, SPLITS), [other])[0]
    assert not torch.allclose(losses(without), losses(curve), rtol=1e-4)


@pytest.mark.parametrize("is_tied", [False, True])
def test_slots_with_trained_tokens_answer_as_alone_in_peft(is_tied: bool, tmp_path: Path) -> None:
    folder = Path(make_model(tmp_path / "model", "qwen2", tie_word_embeddings=is_tied).path)
    options = {**OPTIONS, "trainable_token_head": not is_tied}
    engine = build_engine(folder, SPLITS, slots=2, tokens_per_pass=200)
    train_all(engine, [make_run(tmp_path, i, lr=0.05 * (i + 1), **options) for i in range(2)])
    settings = make_run(tmp_path, 0, **options).settings
    for number in range(2):
        engine.place(settings, tmp_path / str(number) / "adapter", free=number)
    prompts = [list(row.input_ids[: row.num_prompt_tokens]) for row in SPLITS.validation]

    found = generate(engine.model, [0, None, 1], prompts, [2], 6, 10_000)

    adapters = [tmp_path / "0/adapter", None, tmp_path / "1/adapter"]
    assert found == [[plain_answer(folder, adapter, prompt) for prompt in prompts] for adapter in adapters]
    assert found[0] != found[1] != found[2] != found[0]
    scores = engine.scores([0, 1], SPLITS.validation)
    assert scores[0].perplexity == pytest.approx(exported_perplexity(folder, tmp_path), rel=1e-5)


def plain_answer(folder: Path, adapter: Path | None, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    ids: list[int] = []
    while len(ids) < 6:
        with torch.no_grad():
            token = int(model(torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax())
        if token == 2:
            break
        ids.append(token)
    return ids


def test_trained_rows_of_the_head_over_several_chunks_equal_plain_autograd() -> None:
    torch.manual_seed(0)
    num_tokens, width, vocabulary = CPU_ROWS[0] + 50, 8, 30
    head = Head(torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False))
    rows = slice(CPU_ROWS[0] - 20, CPU_ROWS[0] + 30)
    tokens = Tokens(torch.tensor([4, 9]), torch.randn(2, width), torch.zeros(2, width))
    hidden = torch.randn(num_tokens, width, requires_grad=True)
    target, weight = torch.randint(0, vocabulary, (num_tokens,)), torch.rand(num_tokens)
    e_KD = tokens.e_KD.clone().requires_grad_()
    own = head.weight_VD.index_copy(0, tokens.ids_K, e_KD)
    logits = [
        hidden[: rows.start] @ head.weight_VD.T,
        hidden[rows] @ own.T,
        hidden[rows.stop :] @ head.weight_VD.T,
    ]
    expected = F.cross_entropy(torch.cat(logits), target, reduction="none")
    expected_grads = torch.autograd.grad(expected @ weight, (hidden, e_KD))

    nll = head.nll(hidden, target, None, [(tokens, rows)])
    (nll @ weight).backward()

    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close((hidden.grad, tokens.grad_KD), expected_grads)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("wanted", "changes", "message"),
    [
        (
            ((5, 100_000), True),
            {},
            "indices: the base has no token 100000: its embedding has .* resize the base's",
        ),
        (
            ((0, 5), False),
            {"pad_token_id": 0},
            "indices: 0 is the padding token, whose row never learns. Leave",
        ),
        (((5,), True), {"tie_word_embeddings": True}, "head: the base's head is tied .* already. Leave"),
    ],
)
def test_tokens_that_cannot_be_trained_are_refused_before_weights_are_read(
    wanted: tuple[tuple[int, ...], bool], changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    config: ModelConfig = make_model(tmp_path, "qwen2", **changes)

    with pytest.raises(ModelError, match=f"^lora.trainable_token_{message}"):
        check_outline(config.path, config, [("all-linear",)], tokens=[wanted])


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_trained_head_with_a_bias_is_refused_as_peft_drops_it(is_tied: bool, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "qwen2", tie_word_embeddings=is_tied).path
    model = AutoModelForCausalLM.from_pretrained(folder)
    check_tokens(model, (5,), not is_tied)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))

    with pytest.raises(ModelError, match="does more than look up and multiply by rows"):
        check_tokens(model, (5,), not is_tied)


@pytest.mark.wrong_input
def test_tokens_over_several_devices_are_refused() -> None:
    config = SweepConfig(engine=EngineConfig(devices_per_worker=2))
    room = Room(targets=(), max_rank=8, min_batch=1, num_trials=1, tokens=(((5,), False),))

    with pytest.raises(
        ConfigError, match="^lora.trainable_token_indices: cannot be trained with engine.devi"
    ):
        require_exact(config, room, torch.device("cuda"))
