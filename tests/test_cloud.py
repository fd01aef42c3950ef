"""The files of docs/cloud: their commands, as the shell makes them, are settings that this version takes."""

import importlib.util
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_search.settings.composition import compose
from lora_search.settings.schema import SweepConfig

CLOUD = Path(__file__).parents[1] / "docs" / "cloud"
STORAGE = "postgresql+psycopg://bob:a-secret@host/sweeps?sslmode=require"
SAYS_ITS_ARGUMENTS = '#!/bin/bash\nprintf "%s\\n" "$@"\n'


def script(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SAYS_ITS_ARGUMENTS)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def arguments_of(code: str, folder: Path, **environment: str) -> list[str]:
    """Return the arguments that a script gives to the program at its end."""
    known = {"HOME": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}", **environment}
    done = subprocess.run(
        ["bash", "-c", code], env=known, capture_output=True, text=True, check=True, cwd=folder
    )
    assert "a-secret" not in done.stdout
    return done.stdout.splitlines()


def composed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, rows: Path) -> SweepConfig:
    """Return the settings that `python -m lora_search.sweep ...` makes of them, with STORAGE set."""
    monkeypatch.setenv("STORAGE", STORAGE)
    assert arguments[:3] == ["-m", "lora_search.sweep", "-cn"]
    return compose(arguments[3], [*arguments[4:], f"data.path={rows}"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "my.jsonl"
    path.write_text('{"instruction": "a", "response": "b"}\n')
    return path


def sky() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLOUD / "nebius.sky.yaml").read_text())
    return found


def test_every_file_is_tried_here() -> None:
    assert sorted(path.name for path in CLOUD.iterdir()) == [
        "kubernetes.yaml",
        "nebius.sky.yaml",
        "slurm.sbatch",
    ]


def test_the_command_of_skypilot_is_a_sweep(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "venv/bin/python")
    task = sky()

    config = composed(
        arguments_of(task["run"], tmp_path, **task["envs"] | {"STORAGE": STORAGE}), monkeypatch, rows
    )

    assert config.study.storage == STORAGE
    assert config.launcher.name == "local"
    assert config.artifacts.uri == "s3://my-bucket/lora_search"
    assert (config.study.max_cost, config.study.price_per_hour, config.study.n_trials) == (60, 3, None)


def test_skypilot_without_a_database_ends_with_one_message(tmp_path: Path) -> None:
    task = sky()
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        env=task["envs"] | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stdout) == (2, "STORAGE: give the SQL URL that all nodes share\n")


@pytest.mark.skipif(
    importlib.util.find_spec("sky") is None, reason="skypilot takes 700 MB: pip install skypilot to run it"
)
def test_skypilot_itself_reads_the_task() -> None:
    import sky as skypilot

    task = skypilot.Task.from_yaml(str(CLOUD / "nebius.sky.yaml"))

    assert task.num_nodes == 1
    assert {str(resources.cloud) for resources in task.resources} == {"Nebius"}


def test_the_command_of_slurm_is_a_sweep_and_is_told_before_its_end(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "bin/srun")
    text = (CLOUD / "slurm.sbatch").read_text()

    arguments = arguments_of(text, tmp_path, STORAGE=STORAGE)
    config = composed(arguments[1:], monkeypatch, rows)

    assert arguments[0] == ".venv/bin/python"
    assert config.study.storage == STORAGE
    assert "#SBATCH --signal=TERM@180\n" in text


def test_the_command_of_kubernetes_is_a_sweep(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = yaml.safe_load((CLOUD / "kubernetes.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    config = composed(container["command"][1:], monkeypatch, rows)

    assert config.study.storage == STORAGE
    assert config.artifacts.uri == "s3://my-bucket/lora_search"
    assert pod["terminationGracePeriodSeconds"] >= 60
