"""The command that gives all GPU figures, at its tiny size on the CPU: every row is a figure."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.gpu import BATCH_SIZES
from tests.benchmarks.gpu.__main__ import Results, table

EXACT = ("loss of a step", "perplexity in plain PEFT", "time outside passes")  # may be zero


HAS_TRL = importlib.util.find_spec("trl") is not None  # `make bench` installs it


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def figure(text: str) -> float:
    found = re.match(r"[\d.,]+(e[+-]\d+)?", text)
    return float(found[0].replace(",", "")) if found else math.nan


@pytest.mark.slow
def test_every_row_is_a_figure_at_the_tiny_size() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "tiny"]

    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)

    rows = [cells(line) for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [line.name for line in table()]
    failed = [row[0] for row in rows if row[1] == "failed"]
    assert failed == [line.name for line in table() if "TRL" in line.name and not HAS_TRL]
    measured = {row[0]: figure(row[1]) for row in rows if row[1] != "failed"}
    assert all(math.isfinite(value) and value >= 0 for value in measured.values())
    assert [name for name, value in measured.items() if not value and not any(e in name for e in EXACT)] == []


def test_what_fails_is_a_row_with_its_reason_and_the_others_stand() -> None:
    failures = {
        "large": "3 GiB are missing",
        "rivals": "its process ended with -9",
        "trl.large": "no trl",
    }
    results = Results({"matmul": (2e12, "a cube")}, failures)

    rows = {line.name: line.cells(results) for line in table()}

    assert rows["packed against alone, loss of a step, float32"][1:] == ("failed", "", "not measured")
    assert rows["matmul"] == ("matmul", "2 TFLOP/s", "", "a cube")
    assert rows["large model"][1:] == ("failed", "", "3 GiB are missing")
    assert rows["TRL SFTTrainer + PEFT, large model, batch 8, one trial"][3] == "no trl"
    assert rows["plain PEFT loop, large model, batch 8, one trial"][3] == "its process ended with -9"


WITHOUT = """
import runpy, sys
sys.modules |= dict.fromkeys(("hydra", "omegaconf", "optuna", "sqlalchemy", "datasets", "trl", "wandb"))
sys.argv = ["part", "small", "tiny"]
runpy.run_module("tests.benchmarks.gpu.part", run_name="__main__")
"""


@pytest.mark.slow
def test_a_part_runs_where_hydra_optuna_datasets_and_trl_are_missing() -> None:
    command = [sys.executable, "-c", WITHOUT]

    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)

    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"keys"')]
    assert len(records) == 1 + 2 * len(BATCH_SIZES)
    assert not [record["failure"] for record in records if "failure" in record]


@pytest.mark.slow
def test_named_parts_show_each_figure_as_it_comes() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "exact", "tiny"]

    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)

    shown, _, rows = done.stdout.partition("| ---")
    assert "exact: exact.float32 " in shown
    assert "exact: exact.bfloat16 " in shown
    assert "| matmul | failed | | not measured |" in rows.replace("  ", " ")


def test_a_part_that_does_not_exist_is_refused_with_those_that_do() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "smal"]

    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)

    assert done.returncode == 2
    assert "smal: must be one of small, large, exact, rivals, tiny" in done.stderr
