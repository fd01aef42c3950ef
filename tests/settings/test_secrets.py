"""Planted secrets turn up nowhere; names lead nowhere; files execute nothing."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lora_search.errors import ConfigError, DataError, LoraSearchError
from lora_search.model.loading import load_base, resolve_model
from lora_search.reading.load import load_rows
from lora_search.settings.schema import DataConfig, EngineConfig, ModelConfig, StudyConfig, SweepConfig
from lora_search.study.folder import study_folder
from lora_search.study.study import SweepStudy
from tests.servers import real_postgres, sqlalchemy_uri
from tests.worker.test_faults import start

PASSWORD, KEY = "hunter2-of-the-database", "0123456789abcdef0123456789abcdef01234567"


def everything_written(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_no_password_and_no_api_key_is_written_or_said_anywhere(tmp_path: Path, postgres_uri: str) -> None:
    secrets = {"WANDB_API_KEY": KEY, "DB_PASSWORD": PASSWORD, "WANDB_MODE": "offline"}
    typed = postgres_uri.replace("postgres:@", f"postgres:{PASSWORD}@")
    from_environment = postgres_uri.replace("postgres:@", "postgres:${oc.env:DB_PASSWORD}@")
    gone = "postgresql+psycopg://me:${oc.env:DB_PASSWORD}@127.0.0.1:1/db"
    small = ["study.n_trials=2", "train.epochs=1", "tracker=wandb_offline"]
    runs = [
        [*small, f"study.storage='{typed}'"],
        [*small, f"study.storage='{from_environment}'", "study.n_trials=3"],
        [*small, f"study.storage='{gone}'", "study.name=gone"],
        [*small, f"study.storag=postgresql+psycopg://me:{PASSWORD}@127.0.0.1:1/db"],
        [*small, f"study.storage=[postgresql://me:{PASSWORD}@127.0.0.1:1/db"],
        [*small, "study.name=managed", f"study.storage='postgresql+psycopg://u@h:{PASSWORD}@127.0.0.1:1/d'"],
        [*small, "data=jsonl", f"data.path='https://bob:{PASSWORD}@127.0.0.1:1/x.jsonl'"],
        ["--cfg", "job", f"study.storage={typed}"],  # a URL needs no quotes of its own
        [f"study.storage='{typed}'", "--cfg", "job"],
    ]
    codes, said = [], ""
    for arguments in runs:
        process = start(tmp_path, *arguments, env=secrets)
        out, err = process.communicate(timeout=300)
        codes.append(process.returncode)
        said += out + err

    assert codes == [0, 0, 1, 2, 2, 1, 2, 0, 0], said
    files = everything_written(tmp_path)
    names = {path.name for path in files}
    assert {"report.html", "reproduce.md", "settings.json", "adapter_model.safetensors"} <= names
    assert any(name.endswith(".wandb") for name in names)
    rows, attributes = SweepStudy.read(StudyConfig(name="smoke", storage=typed))
    assert len(rows) == 3
    assert "***" in attributes["command"]
    for secret in (PASSWORD, KEY):
        assert secret not in said
        assert secret not in str((rows, attributes))
        assert [path for path, content in files.items() if secret.encode() in content] == []


@pytest.fixture
def postgres_uri() -> Iterator[str]:
    with real_postgres() as server:
        yield sqlalchemy_uri(server)


@pytest.mark.wrong_input
@pytest.mark.parametrize("name", ["..", "../evil", "a/b", "/etc", ".hidden", "a b", "", "x" * 101])
def test_a_study_name_that_is_no_plain_folder_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="study.name: must be 1 to 100 letters"):
        StudyConfig(name=name)


def test_a_study_folder_that_leads_out_of_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "file").touch()
    (tmp_path / "scratch").symlink_to(tmp_path / "runs")

    for name in ("out", "file"):
        with pytest.raises(ConfigError, match=f"study.name: must be a folder inside .*runs, .* got '{name}'"):
            study_folder(SweepConfig(runs_dir=str(tmp_path / "runs"), study=StudyConfig(name=name)))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    through_a_link = SweepConfig(runs_dir=str(tmp_path / "scratch"), study=StudyConfig(name="fine"))
    assert study_folder(through_a_link).is_dir()


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("executed",)


def write_pickle(folder: Path) -> Path:
    (folder / "rows.pkl").write_bytes(pickle.dumps([Evil()]))
    return folder / "rows.pkl"


def write_pickle_named_jsonl(folder: Path) -> Path:
    (folder / "rows.jsonl").write_bytes(pickle.dumps([Evil()]))
    return folder / "rows.jsonl"


def write_pickle_named_parquet(folder: Path) -> Path:
    (folder / "rows.parquet").write_bytes(pickle.dumps([Evil()]))
    return folder / "rows.parquet"


def write_loading_script(folder: Path) -> Path:
    (folder / "set").mkdir()
    (folder / "set" / "set.py").write_text("import os; os.mkdir('executed')")
    return folder / "set"


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    "write", [write_pickle, write_pickle_named_jsonl, write_pickle_named_parquet, write_loading_script]
)
def test_a_data_file_that_would_like_to_be_executed_is_refused_and_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(DataError, match="data.path: "):
        load_rows(DataConfig(path=str(write(tmp_path))))

    assert not (tmp_path / "executed").exists()


def test_a_model_folder_of_pickled_weights_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil()}, tmp_path / "model" / "pytorch_model.bin")
    config = ModelConfig(path=str(tmp_path / "model"))

    with pytest.raises(LoraSearchError, match="model.path: "):
        load_base(resolve_model(config), config, EngineConfig(device="cpu", dtype="float32"))

    assert not (tmp_path / "executed").exists()
