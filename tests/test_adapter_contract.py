"""best/ is enough to serve what was trained, with plain transformers and PEFT."""

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import constants as hub
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lora_search.model.targets import exact_targets
from lora_search.model.tiny import make_tiny_model
from tests.commands import run_sweep

COMMIT = "c" * 40
LEARNT = "Yes."  # every row's answer


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, str]]:
    rows = [
        {"instruction": f"Is {i} even?", "context": f"{i}." * (i % 2), "response": LEARNT} for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


@pytest.fixture
def hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A base in the hub's cache whose eos is not what its chat template ends with, as Qwen2.5's base."""
    repo = tmp_path / "hub/models--org--name"
    folder = make_tiny_model(repo / "snapshots" / COMMIT)
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 0}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<|endoftext|>"}))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMIT)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return "org/name"


def sweep(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> Path:
    settings = [
        "-cn", "smoke", "study.name=s", "study.n_trials=1", "engine.device=cpu", "tracker=none", "data=jsonl",
        f"data.path={folder}/rows.jsonl", "data.max_train_examples=32", "optim.lr=0.02", "train.epochs=1",
        "lora.target_modules=all-linear", "lora.dropout=0", "~space/lora", "~space/optim", "~space/batch",
    ]  # fmt: skip
    assert run_sweep(monkeypatch, folder, *settings, *arguments) == 0
    return folder / "runs/s"


@pytest.mark.parametrize(
    ("template", "system"),
    [
        ("chat", "null"),
        ("inst", "Be brief."),
        pytest.param("chat", "Be brief.", marks=pytest.mark.slow),
        pytest.param("inst", "null", marks=pytest.mark.slow),
    ],
)
def test_best_alone_asks_as_trained_and_ends_its_answers(
    template: str,
    system: str,
    rows: list[dict[str, str]],
    hub_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = sweep(
        monkeypatch,
        tmp_path,
        f"model.path={hub_model}",
        f"template={template}",
        f"template.system_prompt={system}",
        "train.epochs=20",
        "train.evals_per_epoch=1",
        "optim.lr=0.01",
    )
    adapter = folder / "best/adapter"
    pairs = [json.loads(line) for line in (folder / "data/validation.jsonl").read_text().splitlines()]

    told = json.loads((adapter / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(told["base_model_name_or_path"], revision=told["revision"])
    model = PeftModel.from_pretrained(base, str(adapter))
    tokenizer, ends = AutoTokenizer.from_pretrained(adapter), GenerationConfig.from_pretrained(adapter)

    texts = {}
    for row in rows:
        content = "\n\n".join(filter(None, (row["instruction"], row["context"])))
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        texts[tokenizer.decode(inputs["input_ids"][0])] = inputs
    assert {pair["prompt"] for pair in pairs} <= texts.keys()
    asked = texts[pairs[0]["prompt"]]
    answer = model.generate(**asked, generation_config=ends, max_new_tokens=40, do_sample=False)
    written = answer[0, asked["input_ids"].shape[1] :].tolist()
    assert pairs[0]["completion"].endswith(tokenizer.decode(written[-1]))  # it ends as the rows do,
    assert len(written) < 40  # and by itself
    assert (told["base_model_name_or_path"], told["revision"]) == ("org/name", COMMIT)
    assert ends.eos_token_id == ([2, 0] if template == "chat" else [0])


def test_only_the_trained_layers_get_adapters_in_peft(
    rows: list[dict[str, str]], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "layers.1.self_attn.q_proj"
    folder = sweep(monkeypatch, tmp_path, f"model.path={tiny_llama}", f"lora.target_modules=[{target}]")

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), str(folder / "best/adapter")
    )

    carriers = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert carriers == {f"base_model.model.model.{target}"}
    assert json.loads((folder / "trials/0/adapter/adapter_config.json").read_text())["target_modules"] == [
        f"model.{target}"
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.q", "a.1.q"], ["q"]),
        (["a.1.q"], ["a.1.q"]),
        (["q"], "q"),  # as a name it would match a.0.q as well
        (["a.0.q", "a.1.q", "a.0.v"], ["a.0.q", "a.0.v", "a.1.q"]),
    ],
)
def test_targets_are_as_short_as_they_can_be_exact(names: list[str], expected: list[str] | str) -> None:
    modules = ["a", "a.0", "a.0.q", "a.0.v", "a.1", "a.1.q", "a.1.v"]

    assert exact_targets(names, modules if names != ["q"] else [*modules, "q"]) == expected


def test_shared_files_are_readable_settings_keep_types_and_the_page_says_where_the_base_is(
    rows: list[dict[str, str]], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sweep(monkeypatch, tmp_path, f"model.path={tiny_llama}")

    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    settings = json.loads((folder / "best/settings.json").read_text())["settings"]
    assert settings["study.first_trial_is_default"] is True
    assert settings["model.revision"] is None
    assert settings["engine.slots"] == 4 or settings["engine.slots"] == "auto"
    assert settings["lora.target_modules"] == "all-linear"
    page = (folder / "best/reproduce.md").read_text()
    assert f"a folder of this machine, {tiny_llama}" in page
    assert "base_model_name_or_path" in page
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ast.parse(code)
