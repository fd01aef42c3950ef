"""A real sweep with a worker, on a real PostgreSQL: its password is in no file and no command line."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from tests.servers import real_postgres, sqlalchemy_uri

pytestmark = pytest.mark.slow
SECRET = "hunter2-Zebra"
MODULE = [sys.executable, "-m", "lora_search.sweep"]


def arguments_of(pid: int) -> list[bytes]:
    """Return the command lines of a process and of all below it."""
    try:
        own = Path(f"/proc/{pid}/cmdline").read_bytes()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [own, *(line for child in children for line in arguments_of(int(child)))]


def test_a_password_is_in_no_file_and_no_command_line(tmp_path: Path) -> None:
    with real_postgres() as server:
        url = make_url(sqlalchemy_uri(server)).set(password=SECRET).render_as_string(hide_password=False)
        own = ["study.n_trials=2", "launcher=local", "launcher.workers=1", "engine.device=cpu"]
        command = [*MODULE, "-cn", "smoke", "study.storage='${oc.env:PLANTED_URL}'", *own]
        with (tmp_path / "log.txt").open("w") as log:
            process = subprocess.Popen(
                command, cwd=tmp_path, env={**os.environ, "PLANTED_URL": url}, stdout=log, stderr=log
            )
            seen: set[bytes] = set()
            while process.poll() is None:
                seen.update(arguments_of(process.pid))
                time.sleep(0.05)  # between two looks at the process list

    assert process.returncode == 0, (tmp_path / "log.txt").read_text()
    assert len(seen) >= 2  # the launcher and its worker
    assert not [line for line in seen if SECRET.encode() in line]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.html", "study.json"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_help_into_a_full_disk_is_one_line_and_exit_code_1() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*MODULE, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_with_standard_output_closed_is_no_fault() -> None:
    command = f"exec {sys.executable} -m lora_search.sweep --help >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S602

    assert (done.returncode, done.stderr) == (0, "")
