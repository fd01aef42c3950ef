"""The command as users run it: the smoke sweep for real, and what they are told when something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_search import sweep
from lora_search.data.rows import Example
from lora_search.model.loading import load_tokenizer, resolve_model
from lora_search.report import main as report_main
from lora_search.settings.schema import ModelConfig, StudyConfig
from lora_search.study.study import SweepStudy
from lora_search.worker.interrupts import Interrupts
from tests.commands import TINY, run_sweep
from tests.engine.test_engine import plain_perplexity

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke sweep with offline W&B."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        assert (
            run_sweep(patch, folder, *TINY, "study.n_trials=6", "tracker=wandb_offline", "optim.lr=5e-3") == 0
        )
    return folder


def test_the_best_adapter_gives_in_plain_peft_what_the_study_says(finished: Path) -> None:
    best = json.loads((finished / "runs/smoke/best/settings.json").read_text())
    source = resolve_model(ModelConfig(path="tiny-llama"))
    tokenizer = load_tokenizer(source, ModelConfig(path="tiny-llama"))
    pairs = [
        json.loads(line) for line in (finished / "runs/smoke/data/validation.jsonl").read_text().splitlines()
    ]
    tokens = [(tokenizer(p["prompt"])["input_ids"], tokenizer(p["completion"])["input_ids"]) for p in pairs]
    examples = tuple(
        Example(tuple((prompt + completion)[:128]), len(prompt)) for prompt, completion in tokens
    )
    base = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")

    model = PeftModel.from_pretrained(base, str(finished / "runs/smoke/best/adapter"))

    assert plain_perplexity(model, examples) == pytest.approx(best["perplexity"], rel=1e-5)


def test_the_same_command_again_says_that_all_is_done(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_sweep(
        monkeypatch, finished, *TINY, "study.n_trials=6", "tracker=wandb_offline", "optim.lr=5e-3"
    )

    assert code == 0
    assert "6 of 6 trials done" in capsys.readouterr().out


def test_changed_settings_under_the_old_name_are_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_sweep(
        monkeypatch, finished, *TINY, "study.n_trials=6", "optim.lr=5e-3", "optim.weight_decay=0.1"
    )

    assert code == 2
    assert "optim.weight_decay: 0.0 -> 0.1" in capsys.readouterr().out


def test_a_refused_sweep_leaves_the_pairs_of_the_old_one(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = finished / "runs/smoke/data/train.jsonl"
    before = pairs.read_text()

    assert run_sweep(monkeypatch, finished, *TINY, "optim.lr=5e-3", "template=inst") == 2

    assert pairs.read_text() == before


def test_the_report_is_written_anew_and_needs_no_network(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setattr(sys, "argv", ["report", "-cn", "smoke"])

    assert report_main() == 0

    html = (finished / "runs/smoke/report.html").read_text()
    assert "Leaderboard" in html
    assert "<script src=" not in html
    assert "trial 5" in html


BAD_INPUT = [
    (["optim.lrr=1e-4"], r"optim.lrr: there is no such setting. Did you mean optim.lr"),
    (["train.epochs=many"], r"train.epochs: .*many.*Integer"),
    (["train.epochs=0"], "train.epochs: must be at least 1, got 0"),
    (["train.batch_size=-2"], "train.batch_size: must be at least 1, got -2"),
    (["optim.lr=-1"], "optim.lr: must be between 0 and 1, got -1.0"),
    (
        ["lora.use_dora=true", "model.quantization=nf4"],
        "lora.use_dora: cannot be true over model.quantization=nf4 on a CPU, got True",
    ),
    (
        ["lora.init=olora", "model.quantization=nf4"],
        "lora.init: cannot be pissa or olora over model.quantization=nf4, .*Set model.quantization=null",
    ),
    (
        ["lora.init=choice(kaiming,pissa)", "lora.use_dora=true"],
        "lora.use_dora: cannot be true with lora.init=pissa, got True. Set one",
    ),
    (["optim.lr=nan"], "optim.lr: must be between 0 and 1, got nan"),
    (
        ["optim.schedule=cosin"],
        "optim.schedule: must be one of cosine, linear, constant, inverse_sqrt, wsd, got 'cosin'",
    ),
    (["lora.r=0"], r"lora.r: must be in \[1, 4096\], got 0"),
    (["lora.alpha=two"], "lora.alpha: must be a number > 0 or a multiple of r"),
    (["lora.dropout=1.5"], r"lora.dropout: must be in \[0, 1\), got 1.5"),
    (
        ["lora.target_modules=q_proj"],
        r"lora.target_modules: must be a list of layer names, all-linear or a regular expression",
    ),
    (["lora.target_modules=[query]"], "the model has no layer 'query'. There are: down_proj, gate_proj"),
    (
        ["lora.target_modules=[embed_tokens]"],
        r"embed_tokens is a Embedding; .* lora.modules_to_save=\[embed_tokens\] trains the whole of it",
    ),
    (
        ["lora.target_modules=[lm_head]"],
        r"is a Linear; adapters go on linear layers of the decoder only. lora.modules_to_save=\[lm_head\] tr",
    ),
    (["space.lora.r=interval(64,8)"], "space.lora.r: low < high must hold"),
    (["space.lora.rank=choice(1,2)"], "space.lora.rank: is not a setting that can be searched"),
    (["sampler=bayes"], "sampler/bayes: there is no such choice. Available options in 'sampler': cmaes"),
    (["sampler=grid"], "space.optim.lr: a grid needs values that can be counted"),
    (["pruner.reduction_factor=1"], "pruner.reduction_factor: must be at least 2, got 1"),
    (
        ["engine.device=auto", "engine.devices_per_worker=64"],
        r"engine.devices_per_worker: (needs GPUs, and torch sees none"
        r"|must be at most \d+, the GPUs that a worker sees here), got 64. Lower it",
    ),
    (["engine.device=cuda:7"], r"engine.device: must be a device of this machine \(\d GPUs\), got 'cuda:7'"),
    (["engine.device=gpu"], "engine.device: must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    (["engine.slots=0"], "engine.slots: must be at least 1, got 0. auto chooses what fits in memory"),
    (["study.name=../evil"], "study.name: must be 1 to 100 letters"),
    (["study.storage=runs.db"], "study.storage: must be a SQL URL, got 'runs.db'"),
    (
        ["study.n_trials=0"],
        "study.n_trials: must be at least 1, got 0. Use null if study.max_hours or another budget ends",
    ),
    (["model.path=/no/such/folder"], "model.path: the folder /no/such/folder does not exist"),
    (["model.path=/no/model.gguf"], "model.path: /no/model.gguf does not exist"),
    (["data.path=missing.jsonl"], "data.path: missing.jsonl does not exist"),
    (["data=jsonl"], "data.path: is not set"),
    (["data.max_length=4"], "data.max_length: must be a number of tokens >= 8, or auto, got 4"),
    (["data.validation_fraction=0"], "data.validation_fraction: must be between 0 and 1, got 0.0"),
    (["tracker.name=mlflow"], "tracker.name: must be one of wandb_offline, wandb, none, got 'mlflow'"),
    ([f"data.path={'n' * 300}.jsonl"], "data.path: n+.jsonl cannot be read: File name too long."),
    (
        [f"model.path={'n' * 300}"],
        "model.path: n+ cannot be loaded: .*File name too long.* Check name and network",
    ),
    (["-cd", "n" * 300], "-cd n+: no such folder, or no permission to read it."),
    (["runs_dir=/proc/nowhere"], "runs_dir: must be a writable folder"),
    (["study.storage=redis://x"], "study.storage: must be a SQL URL of a known kind, got 'redis://x'"),
    (
        ["study.storage='sqlite:///:memory:'"],
        "study.storage: must name a file, so that the study is kept",
    ),
    (
        ["data.max_train_examples=3"],
        "train.batch_size: must be at most the number of training examples, 3, got 8",
    ),
    (["lora.target_modules=[q_proj,q_proj]"], "lora.target_modules: must name each layer once"),
    (["+x=1"], "x: there is no such setting. See --help."),
    (["space/lora=null"], "space/lora=null: is not a choice of the group space/lora"),
    (["space/lora=null", "--cfg", "job"], "space/lora=null: is not a choice of the group space/lora"),
    (["-cd", "/no/folder"], "-cd /no/folder: no such folder, or no permission"),
    (["-cp", "/no/folder"], "-cp: is not supported; sweeps are in sweeps/. Add your own folder with -cd."),
    (["-cd", ""], "-cd: must not be empty, got ''. Leave it out, or check the variable in it."),
    (["-cn", " "], "-cn: must not be empty, got ' '. Leave it out, or check the variable in it."),
    (["--experimental-rerun", "x"], "--experimental-rerun: is not for sweeps. The same command cont"),
    (["--package", "x"], "--package: works only with --cfg. Leave it out."),
    (
        ["hydra.run.dir=x"],
        "hydra.run.dir=x: Hydra only composes the settings here. Leave it out; runs_dir",
    ),
    (["hydra/launcher=basic"], "hydra/launcher=basic: Hydra only composes the settings here."),
    (["-m"], "-m: a sweep searches by its `space`"),
    (
        ["-cn", "nosuch"],
        "-cn nosuch: no such sweep. There are: construction_faq, llama31_8b_instruct, llama31_8b_wide, smoke",
    ),
    (["optim.lr=[1"], r"optim.lr=\[1: cannot be read"),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=[" ".join(a)[:60] for a, _ in BAD_INPUT])
def test_wrong_input_is_one_clear_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep_name = [] if "-cn" in arguments else TINY
    code = run_sweep(monkeypatch, tmp_path, *sweep_name, *arguments)

    output = " ".join(capsys.readouterr().out.split())
    assert code == 2, output
    assert re.search(message, output), output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-cn", "llama31_8b_instruct"], "study.storage: must be a database that exists"),
        (["-cn", "nosuch"], "-cn nosuch: no such sweep."),
        (["study.names=x"], "study.names: there is no such setting. Did you mean study.name"),
    ],
)
def test_the_report_says_what_is_wrong_with_its_command_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", *arguments])

    assert report_main() == 2
    assert message in capsys.readouterr().out


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lora_search.sweep", *arguments]


def test_help_lists_the_groups_without_torch(tmp_path: Path) -> None:
    code = "import sys, lora_search.sweep, lora_search.report; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    done = subprocess.run(
        command("--help"), capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )

    assert "construction_faq      Which rank" in done.stdout
    for group in ("model: ", "data: ", "sampler: ", "pruner: ", "space/lora: ", "tracker: "):
        assert group in done.stdout
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=False).returncode
        == 0
    )


def test_cfg_job_shows_the_composed_settings(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = command("-cn", "smoke", "--cfg", "job", "optim.lr=interval(1e-5,1e-3)")

    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )

    assert "lr: interval(1e-5,1e-3)" in done.stdout


@pytest.mark.slow
def test_ctrl_c_leaves_a_study_that_the_same_command_finishes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    arguments = command(*TINY, "train.epochs=6", "optim.lr=5e-3", "pruner=none")
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "tokens/s" in line)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()

    for extra in ([], ["study.name=undisturbed"]):
        subprocess.run(
            [*arguments, *extra], stdout=subprocess.DEVNULL, cwd=tmp_path, env=environment, check=True
        )

    assert process.returncode == 130
    assert "nothing is lost" in rest
    storage = f"sqlite:///{tmp_path}/runs/lora_search.db"
    for name in ("smoke", "undisturbed"):
        rows, _ = SweepStudy.read(StudyConfig(name=name, storage=storage))
        assert [row.state for row in rows if row.state != "FAIL"] == ["COMPLETE"] * 8
        assert all(sorted(row.perplexities) == list(range(1, 25)) for row in rows if row.state == "COMPLETE")


class ImpatientInterrupts(Interrupts):
    """Ctrl-C comes after so many passes."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.passes_left = passes

    def check(self) -> None:
        self.passes_left -= 1
        self.has_come = self.passes_left <= 0
        super().check()


def test_ctrl_c_concludes_what_there_is_and_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY, "study.n_trials=2", "engine.slots=2", "pruner=none"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", *command])
    config = StudyConfig(name="smoke", storage=f"sqlite:///{tmp_path}/runs/lora_search.db")

    code = sweep.main(ImpatientInterrupts(passes=8))

    out = capsys.readouterr().out
    best = json.loads((tmp_path / "runs/smoke/best/settings.json").read_text())
    rows, _ = SweepStudy.read(config)
    assert code == 130
    assert "this is the leaderboard so far" in out
    assert "Leaderboard so far" in (tmp_path / "runs/smoke/report.html").read_text()
    assert "more trials    the same command\n" in out
    assert {row.state for row in rows} == {"WAITING"}
    assert best["perplexity"] == min(row.perplexity for row in rows if row.perplexity)
    assert (tmp_path / "runs/smoke/best/adapter/adapter_model.safetensors").exists()

    assert run_sweep(monkeypatch, tmp_path, *command) == 0

    assert "leaderboard so far" not in capsys.readouterr().out
    assert {row.state for row in SweepStudy.read(config)[0]} == {"COMPLETE"}
    assert json.loads((tmp_path / "runs/smoke/best/settings.json").read_text())["state"] == "COMPLETE"
