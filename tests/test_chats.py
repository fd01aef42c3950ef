"""A sweep on chats as users run it: several turns, system messages, greetings; scored again by plain PEFT."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lora_search.model.loading import load_tokenizer, resolve_model
from lora_search.settings.schema import ModelConfig
from tests.commands import TINY, run_sweep

PLACES = ("roof", "wall", "door", "fence", "cellar", "garage", "shed", "balcony")


def chat(number: int) -> list[dict[str, str]]:
    """Return a chat of one to three answers; some have a system message, some begin with a greeting."""
    place = PLACES[number % len(PLACES)]
    turns = [{"role": "system", "content": f"You are inspector {number % 3}."}] if number % 2 else []
    turns += [{"role": "assistant", "content": "Hello, ask me."}] if number % 5 == 0 else []
    for turn in range(1 + number % 3):
        turns.append({"role": "user", "content": f"May I build {place} {number}, part {turn}?"})
        turns.append({"role": "assistant", "content": f"Yes: {place} {number} needs permit {turn}."})
    return turns


def learnt(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return ids, and labels that are -100 outside of answers, by plain transformers turn by turn."""

    def ids(part: list[dict[str, str]], ask: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=ask)
        return tokenizer(text if ask else text.rstrip("\n"), add_special_tokens=False)["input_ids"]

    whole = ids(turns)
    labels, asked = [-100] * len(whole), False
    for number, turn in enumerate(turns):
        asked = asked or turn["role"] == "user"
        if asked and turn["role"] == "assistant":
            start, end = len(ids(turns[:number], ask=True)), len(ids(turns[: number + 1]))
            labels[start:end] = whole[start:end]
    return whole, labels


def row_losses(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each learnt token."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none")
    return losses[labels[0, 1:] != -100]


SMOLLM2 = [
    "engine.dtype=float32", "tracker=none", "study.sample_answers=0", "train.epochs=1", "space.optim.lr=null",
    "optim.lr=1e-3", "space.lora.r=null",
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "settings", "falls_by"),
    [
        pytest.param("tiny-llama", [*TINY, "optim.lr=5e-3"], 0.0, id="tiny"),
        pytest.param("smollm2-135m-instruct", SMOLLM2, 0.5, id="smollm2", marks=pytest.mark.slow),
    ],
)
def test_the_best_adapter_of_a_sweep_on_chats_gives_in_plain_peft_what_the_study_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, settings: list[str], falls_by: float
) -> None:
    chats = [chat(number) for number in range(32)]
    for name, part in (("train", chats[:24]), ("test", chats[24:28]), ("validation", chats[28:])):
        lines = "".join(json.dumps({"messages": turns}) + "\n" for turns in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    paths = [f"data.{name}_path={tmp_path}/{name}.jsonl" for name in ("validation", "test")]

    given = [
        "data=jsonl",
        f"data.path={tmp_path}/train.jsonl",
        *paths,
        "study.name=chats",
        "study.n_trials=3",
    ]
    assert run_sweep(monkeypatch, tmp_path, *settings, *given, "data.max_length=512") == 0

    best = json.loads((tmp_path / "runs/chats/best/settings.json").read_text())
    source = resolve_model(ModelConfig(path=model))
    tokenizer = load_tokenizer(source, ModelConfig(path=model))
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "runs/chats/best/adapter")).eval()
    losses, before = [], []
    for turns in chats[28:]:
        ids, labels = (torch.tensor([row]) for row in learnt(turns, tokenizer))
        losses.append(row_losses(tuned, ids, labels))
        with tuned.disable_adapter():
            before.append(row_losses(tuned, ids, labels))
    perplexity, base_perplexity = (torch.cat(rows).mean().exp().item() for rows in (losses, before))
    assert best["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert perplexity < base_perplexity * (1 - falls_by)
