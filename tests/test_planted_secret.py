"""A real sweep with a worker, on a real PostgreSQL: its password is in no file and no command line."""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tests.servers import real_postgres, sqlalchemy_uri

pytestmark = pytest.mark.slow
SECRETS = {"the database": "hunter2-Zebra", "an option": "opt-Secret-77", "the rows": "rows-Secret-88",
           "a token": "tok-Secret-99"}  # fmt: skip
MODULE = [sys.executable, "-m", "lora_search.sweep"]


def arguments_of(pid: int) -> list[bytes]:
    """Return the command lines of a process and of all below it."""
    try:
        own = Path(f"/proc/{pid}/cmdline").read_bytes()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [own, *(line for child in children for line in arguments_of(int(child)))]


@contextmanager
def guarded_rows(folder: Path) -> Iterator[int]:
    """Serve rows to who gives a password and a token; yield the port."""
    rows = [{"question": f"Question {i}?", "answer": f"Answer {i}."} for i in range(40)]
    (folder / "faq.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    class Guard(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 (the library's name)
            known = base64.b64encode(f"bob:{SECRETS['the rows']}".encode()).decode()
            is_known = self.headers.get("Authorization") == f"Basic {known}"
            if is_known and f"token={SECRETS['a token']}" in self.path:
                super().do_GET()
            else:
                self.send_error(401)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Guard, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def role(url: str, name: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f'CREATE ROLE "{name}" SUPERUSER LOGIN'))
    engine.dispose()


def test_no_password_is_in_a_file_or_a_command_line(tmp_path: Path) -> None:
    """The user has an @ and a / in his name, and passwords are in the options and the query as well."""
    (tmp_path / "served").mkdir()
    with real_postgres() as server, guarded_rows(tmp_path / "served") as port:
        plain = sqlalchemy_uri(server)
        role(plain, "us/er@server")
        named = plain.replace("postgres:@", f"us%2Fer@server:{SECRETS['the database']}@")
        storage = f"{named}&options=-c%20my.password%3D{SECRETS['an option']}"
        query = f"token={SECRETS['a token']}&page=1"
        data = f"http://bob:{SECRETS['the rows']}@127.0.0.1:{port}/faq.jsonl?{query}"
        own = ["study.n_trials=2", "launcher=local", "launcher.workers=1", "engine.device=cpu", "data=jsonl"]
        given = ["study.storage='${oc.env:PLANTED_URL}'", "data.path='${oc.env:PLANTED_DATA}'"]
        planted = {"PLANTED_URL": storage, "PLANTED_DATA": data, "HF_HOME": f"{tmp_path}/hub",
                   "LORA_SEARCH_CACHE": f"{tmp_path}/cache"}  # fmt: skip
        with (tmp_path / "log.txt").open("w") as log:
            process = subprocess.Popen([*MODULE, "-cn", "smoke", *given, *own], cwd=tmp_path,
                                       env={**os.environ, **planted}, stdout=log, stderr=log)  # fmt: skip
            seen: set[bytes] = set()
            while process.poll() is None:
                seen.update(arguments_of(process.pid))
                time.sleep(0.05)  # between two looks at the process list

    assert process.returncode == 0, (tmp_path / "log.txt").read_text()
    assert len(seen) >= 2  # the launcher and its worker
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"report.html", "study.json", "settings.json"} <= {path.name for path in files}
    assert any("downloads" in path.parts for path in files)
    for what, secret in SECRETS.items():
        assert not [line for line in seen if secret.encode() in line], what
        assert not [path for path, content in files.items() if secret.encode() in content], what


REFUSED = [
    "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D{}%3BEncrypt%3Dyes",
    "mssql+pyodbc://host/db?driver=x;PWD={};Encrypt=yes",
    "postgresql+psycopg://us/er:{}@127.0.0.1:1/db",
    "postgresql+psycopg://user@server:{}@127.0.0.1:1/db",
    "postgresql+psycopg://u@127.0.0.1:1/db?options=-c password={}",
    "postgresql+psycopg://u@127.0.0.1:1/db?sslpassword={}",
    "mysql+pymysql://u:p@{}@127.0.0.1:1/db",
]


@pytest.mark.wrong_input
@pytest.mark.parametrize("url", REFUSED)
def test_the_refusal_of_a_url_says_no_password(url: str, tmp_path: Path) -> None:
    """As typed, in its own process: nothing of an earlier one is remembered."""
    secret = SECRETS["the database"]
    done = subprocess.run([*MODULE, "-cn", "smoke", f"study.storage='{url.format(secret)}'"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)  # fmt: skip

    assert done.returncode in (1, 2), done.stdout  # 1 where the server may only be away
    assert "study.storage: " in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert secret not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


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
