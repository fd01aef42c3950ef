"""Rows and file names that would drive the terminal: what a whole sweep prints and writes to its log."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVIL = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \x08\x08 \r over"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@pytest.mark.slow
def test_control_sequences_in_rows_and_names_never_reach_the_terminal_or_the_log(tmp_path: Path) -> None:
    rows = [{"instruction": f"{EVIL} question {i}", "response": f"{EVIL} answer {i}"} for i in range(60)]
    data = tmp_path / "\x1b[2Jmine.jsonl"
    data.write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"instruction": "\\u001b[5m no answer"}\n'
    )
    command = [sys.executable, "-m", "lora_search.sweep", "-cn", "smoke", "engine.device=cpu", "data=jsonl",
               f'data.path="{data}"', "data.on_bad_row=skip", "study.n_trials=2",
               "study.sample_answers=1"]  # fmt: skip

    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )

    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "runs/smoke/sweep.log").read_text()
    assert "Leaderboard" in done.stdout
    assert "mine.jsonl" in log
    for text in (done.stdout, done.stderr, log):
        assert CONTROL.findall(text) == []
