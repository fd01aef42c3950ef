"""What follows a search: test score, export, answers, confirmation. One finished smoke sweep serves all."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_search import delete, export, generate, report, score, status
from lora_search import list as list_command
from lora_search.data.rows import Example
from lora_search.errors import FingerprintError
from lora_search.model.loading import load_tokenizer, resolve_model
from lora_search.output.model_card import needs_merging, rank_option
from lora_search.results.ranking import best_of
from lora_search.service.reopen import reopen
from lora_search.settings.recorded import recorded_config
from lora_search.settings.schema import ModelConfig, StudyConfig
from lora_search.study.stored_results import read_test_score
from lora_search.study.study import SweepStudy
from lora_search.study.view import study_names
from lora_search.trial import TrialRow
from tests.engine.test_engine import plain_perplexity
from tests.hub import Repository, running_hub

TINY = ModelConfig(path="tiny-llama")
STUDY = StudyConfig(name="smoke")


@pytest.fixture(scope="module")
def finished(smoke_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished sweep."""
    folder = tmp_path_factory.mktemp("answer")
    shutil.copytree(smoke_sweep / "runs", folder / "runs")
    return folder


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


def test_a_sweep_ends_with_one_look_at_the_test_split(
    smoke_sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(smoke_sweep)
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
    assert "Add --again" in refused
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


def test_an_exported_adapter_serves_in_plain_peft_and_its_card_says_how_good_it_is(
    typed: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, _ = study_now()

    assert typed(export.main, f"to={tmp_path}/served") == 0

    model = PeftModel.from_pretrained(plain_base(), f"{tmp_path}/served")
    assert plain_perplexity(model, examples_of("validation")) == pytest.approx(best.perplexity, rel=1e-5)
    card = (tmp_path / "served/README.md").read_text()
    assert f"validation perplexity {best.perplexity:.4f}" in card
    assert re.search(r"95 % interval -\d+\.\d to -\d+\.\d %, 8 validation rows", card)
    assert "test split, 65 rows" in card
    assert "tokenizer.json" in {path.name for path in (tmp_path / "served").iterdir()}
    assert (" --max-lora-rank 32" in card) == (best.params["lora.r"] == 32)
    said = " ".join(capsys.readouterr().out.split())
    rank = " --max-lora-rank 32" if best.params["lora.r"] == 32 else ""
    assert f"--enable-lora{rank} --lora-modules smoke={tmp_path}/served" in said
    assert f"--chat-template {tmp_path}/served/chat_template.jinja" in said
    assert (tmp_path / "served/chat_template.jinja").is_file()


LOADED = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tuned = PeftModel.from_pretrained(base, "me/faq")
print(float(sum(p.double().abs().sum() for name, p in tuned.named_parameters() if "lora_" in name)))
print(AutoTokenizer.from_pretrained("me/faq").chat_template)
"""


@pytest.mark.slow
def test_an_exported_adapter_goes_to_a_hub_and_comes_back(typed: Callable[..., int], tmp_path: Path) -> None:
    assert typed(export.main, f"to={tmp_path}/served") == 0
    repositories: dict[str, Repository] = {}
    with running_hub(repositories) as endpoint:
        usual = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        hub = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_x", "HF_HOME": f"{tmp_path}/home"}
        run = partial(subprocess.run, env={**usual, **hub}, check=True, capture_output=True, text=True)

        run([Path(sys.executable).parent / "hf", "upload", "me/faq", f"{tmp_path}/served"])

        told = run([sys.executable, "-c", LOADED, resolve_model(TINY)]).stdout.strip()

    uploaded = repositories["me/faq"].commits[-1]
    assert uploaded == {path.name: path.read_bytes() for path in (tmp_path / "served").iterdir()}
    weights = load_file(tmp_path / "served/adapter_model.safetensors").values()
    total, _, template = told.partition("\n")
    assert float(total) == pytest.approx(float(sum(w.double().abs().sum() for w in weights)))
    assert template == (tmp_path / "served/chat_template.jinja").read_text().strip()


def test_an_exported_adapter_has_what_vllm_asks_for_and_nothing_that_it_refuses(
    typed: Callable[..., int], tmp_path: Path
) -> None:
    assert typed(export.main, f"to={tmp_path}/served") == 0

    config = json.loads((tmp_path / "served/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "served/adapter_model.safetensors")
    assert (config["peft_type"], config["bias"], config["use_dora"]) == ("LORA", "none", False)
    assert config["modules_to_save"] is config["trainable_token_indices"] is None
    names = {re.sub(r"^base_model\.model\.model\.layers\.\d+\.\w+\.", "", name) for name in tensors}
    assert names == {
        f"{target}.lora_{side}.weight" for target in config["target_modules"] for side in ("A", "B")
    }


@pytest.mark.parametrize(
    ("settings", "merging"),
    [({}, False), ({"lora.use_dora": False}, False), ({"lora.use_dora": True}, True),
     ({"lora.bias": "none"}, False), ({"lora.bias": "lora_only"}, True),
     ({"lora.modules_to_save": []}, False), ({"lora.modules_to_save": ["lm_head"]}, True),
     ({"lora.rank_pattern": None}, False), ({"lora.rank_pattern.q_proj": 8}, True)],
)  # fmt: skip
def test_what_vllm_cannot_serve_is_merged_first(settings: dict[str, object], merging: bool) -> None:
    assert needs_merging(settings) is merging


@pytest.mark.parametrize(
    ("rank", "init", "option"),
    [(8, "kaiming", ""), (16, "gaussian", ""), (24, "kaiming", " --max-lora-rank 32"), (8, "pissa", ""),
     (300, "kaiming", " --max-lora-rank 320"), (16, "olora", " --max-lora-rank 32")],
)  # fmt: skip
def test_vllm_is_told_of_ranks_above_its_default(rank: int, init: str, option: str) -> None:
    assert rank_option({"lora.r": rank, "lora.init": init}) == option


def test_merged_weights_give_the_studys_perplexity_without_peft(
    typed: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = SweepStudy.read(STUDY)

    assert typed(export.main, "merge=true", "trial=1", f"to={tmp_path}/merged") == 0

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    found = plain_perplexity(model, examples_of("validation"))
    assert found == pytest.approx(rows[1].perplexity, rel=1e-5)
    (shown,) = re.findall(r"validation perplexity (\d+\.\d{4})", capsys.readouterr().out)
    assert float(shown) == pytest.approx(found, rel=1e-5)
    assert shown in (tmp_path / "merged/README.md").read_text()
    assert not (tmp_path / "merged/adapter_config.json").exists()
    modes = {(tmp_path / "merged" / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1  # another user may serve it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trial=99"], "trial: must be a trial that has a perplexity, got '99'. There are: 0, 1, 2, 3."),
        (["merge=yes"], "merge: must be true or false, got 'yes'."),
        (["to=runs/smoke"], "to: must be a new or empty folder, got 'runs/smoke'."),
        (["too=x"], "too: this command has no such key. Did you mean to?"),
        (["trail=3"], "trail: this command has no such key. Did you mean trial?"),
    ],
)
def test_wrong_exports_are_one_message_and_write_nothing(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert typed(export.main, *arguments) == 2

    assert message in " ".join(capsys.readouterr().out.split())
    assert not Path("runs/smoke/export").exists()


def plain_answer(model: torch.nn.Module, question: str, num_tokens: int) -> str:
    """Return the greedy answer that a loop over the logits gives."""
    tokenizer = load_tokenizer(resolve_model(TINY), TINY)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer: list[int] = []
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    while len(answer) < num_tokens and end not in answer:
        with torch.no_grad():
            answer.append(int(model(torch.tensor([[*ids, *answer]])).logits[0, -1].argmax()))
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def test_base_and_trials_answer_side_by_side(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(generate.main, "What is a=b here?", "Who pays?", "trials=0,2", "max_new_tokens=6") == 0

    out = capsys.readouterr().out
    sides = ["[base]", "[trial 0]", "[trial 2]"]
    heads = re.findall(r"^(?:\[base\]|\[trial \d\]|What is a=b here\?|Who pays\?)$", out, re.MULTILINE)
    assert heads == ["What is a=b here?", *sides, "Who pays?", *sides]
    assert plain_answer(plain_base(), "Who pays?", 6) in out


def test_a_file_is_answered_as_one_question_alone_would_be(typed: Callable[..., int], tmp_path: Path) -> None:
    questions = ["Who pays?", "What is a building permit, and who grants it?", "Why?"]
    asked = "".join(f"{json.dumps({'question': question})}\n" for question in questions)
    (tmp_path / "asked.jsonl").write_text(asked)
    arguments = [f"questions={tmp_path}/asked.jsonl", f"answers={tmp_path}/out.jsonl", "max_new_tokens=6"]

    assert typed(generate.main, *arguments, "trials=1", "batch_size=2") == 0

    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    base, adapted = plain_base(), PeftModel.from_pretrained(plain_base(), "runs/smoke/trials/1/adapter")
    assert [line["question"] for line in lines] == questions
    assert [line["base"] for line in lines] == [plain_answer(base, q, 6) for q in questions]
    assert [line["trial 1"] for line in lines] == [plain_answer(adapted, q, 6) for q in questions]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "generate: no question."),
        (["Why?", "max_new_tokens=0"], "max_new_tokens: must be a whole number >= 1, got '0'."),
        (["questions=missing.jsonl"], "answers: must name the file to write"),
        (["questions=missing.jsonl", "answers=o"], "questions: missing.jsonl cannot be read"),
        (["Why?", "trials=7"], "trials: must be a trial that has a perplexity, got '7'."),
    ],
)
def test_wrong_questions_are_one_message(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert typed(generate.main, *arguments) == 2

    assert message in " ".join(capsys.readouterr().out.split())


def test_status_shows_one_study_and_list_all(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    best, _ = study_now()

    assert typed(status.main) == 0
    one = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["list"])
    assert list_command.main() == 0

    line = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("smoke"))
    assert line[:6] == ["smoke", "4/4", "4", "0", "0", "0"]
    assert float(line[6]) == pytest.approx(best.perplexity, abs=0.06)
    assert "Leaderboard" in one
    assert "test split, 65 rows" in one


def test_delete_asks_and_takes_nothing_but_the_name_for_an_answer(
    typed: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))

    assert typed(delete.main) == 2

    assert "nothing is deleted" in " ".join(capsys.readouterr().out.split())
    assert Path("runs/smoke/best").is_dir()
    assert study_now()


def test_a_deleted_study_is_gone_from_storage_and_disk_and_the_others_stay(
    typed: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished / "runs", copy / "runs")
    monkeypatch.chdir(copy)
    Path("runs/other").mkdir()
    monkeypatch.setattr(sys, "stdin", io.StringIO("smoke\n"))
    monkeypatch.setattr(sys, "argv", ["delete", "study.name=smoke"])

    assert delete.main() == 0

    assert study_names(STUDY) == []
    assert sorted(path.name for path in Path("runs").iterdir() if path.is_dir()) == ["other"]
    assert study_names(replace(STUDY, storage=f"sqlite:///{finished}/runs/lora_search.db")) == ["smoke"]


def test_a_study_whose_copies_cannot_be_deleted_stays_and_the_command_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "runs", tmp_path / "copy/runs")
    monkeypatch.chdir(tmp_path / "copy")
    line = ["delete", "study.name=smoke", "--yes"]
    (tmp_path / "file").touch()
    for uri, code, told in (
        ("gs://b/x", 2, "a URI that fsspec opens"),
        (f"{tmp_path}/file", 1, "still here"),
    ):
        monkeypatch.setattr(sys, "argv", [*line, f"artifacts.uri={uri}"])
        assert delete.main() == code
        assert told in " ".join(capsys.readouterr().out.split())
        assert study_names(STUDY) == ["smoke"]
        assert Path("runs/smoke/best").is_dir()

    monkeypatch.setattr(sys, "argv", [*line, "artifacts.uri=null"])
    assert delete.main() == 0
    assert study_names(STUDY) == []


def test_status_and_its_kin_import_no_torch() -> None:
    names = "status, confirm, final, list, delete, export, generate, score, report"
    code = f"import sys\nfrom lora_search import {names}\nsys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_report_says_the_same_as_json_and_markdown(typed: Callable[..., int]) -> None:
    rows, attributes = SweepStudy.read(STUDY)
    best, _ = study_now()

    assert typed(report.main, "--format", "json") == 0
    assert typed(report.main, "--format", "md") == 0

    facts = json.loads(Path("runs/smoke/report.json").read_text())
    assert {t["number"]: t["perplexity"] for t in facts["trials"]} == {r.number: r.perplexity for r in rows}
    assert facts["best"] == best.number
    assert facts["base_perplexity"] == float(attributes["base_perplexity"])
    assert facts["test_score"]["trial"] == best.number
    markdown = Path("runs/smoke/report.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in markdown) == len(rows) + 3  # head, rule, base
    assert any(line.startswith(f"| {best.number} | ") for line in markdown)
