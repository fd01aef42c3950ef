"""Nodes with disks of their own: they share a database and a real S3 server, as rented machines do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_search.errors import LoraSearchError
from lora_search.settings.schema import StudyConfig
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow
from tests.servers import real_s3

ROOT = Path(__file__).parents[1]
SWEEP = ["-cn", "smoke", "engine.device=cpu", "engine.slots=1", "pruner=none", "optim.lr=5e-3",
         "study.n_trials=2", "train.epochs=3", "lora.dropout=0.1"]  # fmt: skip


def start(node: Path, storage: str, environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    """Start the sweep on a node: a folder that no other node sees."""
    node.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "lora_search.sweep", *SWEEP, f"study.storage={storage}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=node,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def rows_of(storage: str) -> list[TrialRow]:
    return StudyView(StudyConfig(name="smoke", storage=storage)).rows()


def wait_for_rung(storage: str, trial: int, rung: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            if any(row.number == trial and len(row.perplexities) >= rung for row in rows_of(storage)):
                return
        except LoraSearchError:
            pass  # there is no study yet
        time.sleep(0.1)
    raise AssertionError(f"trial {trial} did not reach rung {rung}")


@pytest.mark.slow
def test_a_sweep_that_one_node_began_ends_on_another_as_if_there_had_been_one(tmp_path: Path) -> None:
    alone, shared = (f"sqlite:///{tmp_path}/{name}.db" for name in ("alone", "shared"))
    start(tmp_path / "whole", alone, {}).communicate(timeout=300)
    with real_s3() as environment:
        copies = "artifacts.uri=s3://bucket/runs"
        first = start(tmp_path / "a", shared, environment, copies)
        wait_for_rung(shared, trial=0, rung=3)
        first.send_signal(signal.SIGTERM)
        said, _ = first.communicate(timeout=120)
        left = rows_of(shared)[0]
        second = start(tmp_path / "b", shared, environment, copies)
        said_later, _ = second.communicate(timeout=300)
        secret = environment["AWS_SECRET_ACCESS_KEY"]

    assert (first.returncode, second.returncode) == (130, 0), said + said_later
    assert 3 <= len(left.perplexities) < 12
    assert [row.perplexities for row in rows_of(shared)] == [row.perplexities for row in rows_of(alone)]
    assert [row.train_tokens for row in rows_of(shared)] == [row.train_tokens for row in rows_of(alone)]
    assert [row.recovery for row in rows_of(shared)] == ["", ""]
    best = tmp_path / "b/runs/smoke/best/adapter/adapter_model.safetensors"
    assert best.is_file()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in said + said_later


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with real_s3() as environment:
        refused = start(
            tmp_path / "a", f"sqlite:///{tmp_path}/s.db", environment, "artifacts.uri=s3://no-such-bucket/x"
        )
        said, _ = refused.communicate(timeout=120)

    assert refused.returncode == 2
    assert "artifacts.uri: must be a place that can be written to and read" in said
    assert "Traceback" not in said
    assert not (tmp_path / "s.db").exists()
    assert not (tmp_path / "a/runs/smoke").exists()
