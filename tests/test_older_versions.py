"""Studies, checkpoints and adapters of the version before the rooms are read, gone on with, and compared with
what it would have measured."""

import json
import math
import sqlite3
import tarfile
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_search.report import main as report_main
from lora_search.settings.schema import StudyConfig
from lora_search.study.study import SweepStudy
from tests.commands import run_sweep

KEPT = Path(__file__).parent / "data_before_rooms" / "runs.tar.gz"
ITS_COMMAND = [
    "-cn", "smoke", "study.name=before", "engine.slots=1", "engine.dtype=float32", "engine.device=cpu",
    "train.epochs=12", "tracker=none", "pruner=none",
]  # fmt: skip
ITS_RUNG, ITS_END = 4, 314.2212820560614  # where trial 1 was interrupted; what the old version made of it
ROUNDING = 1e-5  # other processors add in another order


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The runs folder as the old version left it: trial 0 complete, trial 1 interrupted."""
    with tarfile.open(KEPT) as archive:
        archive.extractall(tmp_path / "runs", filter="data")
    return tmp_path


def read(folder: Path) -> StudyConfig:
    return StudyConfig(name="before", storage=f"sqlite:///{folder}/runs/lora_search.db")


def test_an_old_study_goes_on_from_its_rung_and_ends_with_the_old_value(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = SweepStudy.read(read(old))

    assert run_sweep(monkeypatch, old, *ITS_COMMAND, "study.n_trials=2") == 0, capsys.readouterr().out

    after, attributes = SweepStudy.read(read(old))
    assert [max(row.perplexities) for row in before] == [48, ITS_RUNG]
    assert before[1].train_tokens > 0  # it kept progress among the user attributes
    assert after[1].perplexities.items() >= before[1].perplexities.items()
    assert after[1].perplexity == pytest.approx(ITS_END, rel=ROUNDING)
    assert after[1].recovery == ""  # its checkpoint was taken
    assert after[1].train_tokens == 36864  # no row was trained twice
    assert json.loads((old / "runs/before/study.json").read_text())["id"] == attributes["study_id"]
    assert run_sweep(monkeypatch, old, *ITS_COMMAND, "study.n_trials=2") == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.max_train_examples=16", "data.max_train_examples: 24 -> 16"),
        ("template=inst", "template.name: chat -> inst"),
        ("data.on_control_text=keep", ""),  # a setting that it did not know, and the rows are the same
        ("seed=1", "seed: 0 -> 1"),
    ],
)
def test_an_old_study_is_compared_as_far_as_it_knows(
    old: Path, change: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_sweep(monkeypatch, old, *ITS_COMMAND, "study.n_trials=1", change)

    assert code == (2 if words else 0)
    assert words in capsys.readouterr().out
    assert (old / "runs/before/study.json").exists() == (not words)


def test_an_old_study_is_not_gone_on_with_on_another_base(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(old / "cache"))
    assert (
        run_sweep(monkeypatch, old, *ITS_COMMAND[2:3], "-cn", "smoke", "study.name=x", "study.n_trials=1")
        == 0
    )
    weights = old / "cache/tiny-llama-1/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 1.1
    save_file(tensors, weights, {"format": "pt"})

    assert run_sweep(monkeypatch, old, *ITS_COMMAND, "study.n_trials=2") == 2

    assert "the base model or the validation rows changed: validation perplexity 322.098 -> 32" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_new_study_does_not_take_an_old_folder(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (old / "runs/lora_search.db").unlink()
    kept = sorted((path, path.stat().st_mtime_ns) for path in (old / "runs").rglob("*"))

    assert run_sweep(monkeypatch, old, *ITS_COMMAND, "study.n_trials=1") == 2

    assert "has the results of a study that is not in study.storage" in capsys.readouterr().out
    assert sorted((path, path.stat().st_mtime_ns) for path in (old / "runs").rglob("*")) == kept


def test_an_old_adapter_and_its_report_are_read(
    old: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(base, str(old / "runs/before/best/adapter"))
    monkeypatch.chdir(old)
    monkeypatch.setattr("sys.argv", ["report", "study.name=before"])

    assert report_main() == 0

    assert sum("lora_B" in name for name, _ in model.named_parameters()) == 4
    assert "296.2" in (old / "runs/before/report.html").read_text()
    assert not (old / "runs/before/study.json").exists()  # who only looks marks nothing


def test_settings_of_an_old_study_get_their_types_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sqlite3.connect(old / "runs/lora_search.db") as connection:
        (told,) = connection.execute(
            "select value_json from study_user_attributes where key = 'setting/sweep.model.revision'"
        ).fetchone()
    assert told == '"None"'

    assert run_sweep(monkeypatch, old, *ITS_COMMAND, "study.n_trials=1") == 0

    settings = json.loads((old / "runs/before/best/settings.json").read_text())["settings"]
    assert (settings["model.revision"], settings["model.trust_remote_code"]) == (None, False)
    assert (settings["study.n_trials"], settings["lora.target_modules"]) == (1, ["q_proj", "v_proj"])
    assert math.isclose(settings["optim.eps"], 1e-8)
