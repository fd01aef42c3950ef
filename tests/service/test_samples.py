"""Sample answers: what plain transformers says to the rows as they were trained, shown in the report."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_search.service.samples import MAX_NEW_TOKENS, without_frame
from tests.commands import run_sweep

FRAME = ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


def test_a_question_is_shown_without_the_template() -> None:
    texts = ["What is a snag list?", "What is ROT?", "Who pays\n\nfor it?"]
    prompts = [FRAME[0] + text + FRAME[1] for text in texts]

    assert without_frame(prompts[:2], prompts) == texts[:2]
    assert without_frame([f"[INST] {text} [/INST]" for text in texts],
                         [f"[INST] {text} [/INST]" for text in texts]) == texts  # fmt: skip


def test_what_all_questions_share_stays() -> None:
    prompts = [f"{FRAME[0]}What is {what}?{FRAME[1]}" for what in ("ROT", "a permit")]

    assert without_frame(prompts, prompts) == ["What is ROT?", "What is a permit?"]


@pytest.mark.slow
def test_a_sweep_keeps_what_base_and_best_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["-cn", "smoke", "engine.device=cpu", "study.n_trials=1", "study.sample_answers=2"]
    assert run_sweep(monkeypatch, tmp_path, *arguments) == 0
    folder = tmp_path / "runs/smoke"
    lines = (folder / "data/validation.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines[:2]]

    kept = json.loads((folder / "samples.json").read_text(encoding="utf-8"))

    settings = json.loads((folder / "best/settings.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "best/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "best/adapter")
    said = {"base": [greedy(model, tokenizer, pair["prompt"]) for pair in pairs]}
    tuned = PeftModel.from_pretrained(model, str(folder / "best/adapter"))
    said["best"] = [greedy(tuned, tokenizer, pair["prompt"]) for pair in pairs]
    assert kept["trial"] == settings["trial"] == 0
    assert [sample["base"] for sample in kept["samples"]] == said["base"]
    assert [sample["best"] for sample in kept["samples"]] == said["best"]
    assert all(
        sample["question"] in pair["prompt"] for sample, pair in zip(kept["samples"], pairs, strict=True)
    )
    assert "Sample answers" in (folder / "report.html").read_text(encoding="utf-8")


def greedy(model: torch.nn.Module, tokenizer: "AutoTokenizer", prompt: str) -> str:
    """Return the likeliest next token, one after the other."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(MAX_NEW_TOKENS):
        with torch.no_grad():
            token = model(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
        if int(token) == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True)).strip()
