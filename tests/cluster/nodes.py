"""Nodes of a Ray cluster on one machine: each has a host name, processes and a disk of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--block"]
SMALL = ["--num-cpus=1", "--object-store-memory=80000000"]
SPACES = ["--uts", "--pid", "--mount"]
AS_USER = [] if os.geteuid() == 0 else ["--user"]  # who is not root makes the others within one of users
OWN = ["unshare", *SPACES, *AS_USER, *(["--map-root-user"] if AS_USER else []), "--mount-proc", "--fork"]
CAN_BE_MADE = subprocess.run([*OWN, "true"], capture_output=True).returncode == 0
START_SECONDS = 90


class Node:
    """Its processes are those of one PID namespace: the kernel kills them all at once with the first."""

    def __init__(self, name: str, folder: Path, options: list[str], environment: dict[str, str]) -> None:
        self.name, self.disk = name, folder / name
        self.disk.mkdir()
        # A cluster asks for a token once any ray.init() of the user has made one.
        self.environment = {**environment, "DISK": str(self.disk), "RAY_AUTH_MODE": "disabled"}
        log, line = self.disk / "ray.log", [*RAY, *SMALL, *options]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [*OWN, "--kill-child", "sh", "-c", f'hostname {name}; exec "$@"', "sh", *line],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
            )
        until = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)

    def workers(self) -> list[psutil.Process]:
        """Return the sweeps' workers on this node, oldest first."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if any("launcher.worker=" in word for word in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                pass  # it has just ended
        return sorted(found, key=lambda process: process.create_time())

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process on this node. Killing what is returned leaves the process, which is its child."""
        first = psutil.Process(self._process.pid).children()[0].pid
        enter = ["nsenter", f"--target={first}", *SPACES, *AS_USER, f"--wd={log.parent}"]
        with log.open("wb") as out:
            return subprocess.Popen(
                [*enter, *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
            )

    def lose(self) -> None:
        """Kill everything on it at once."""
        self._process.kill()
        self._process.wait(30)


@contextmanager
def ray_cluster(folder: Path, names: str, environment: dict[str, str]) -> Iterator[dict[str, Node]]:
    """Start a node for each letter, the head first; yield them by name. `address` is the head's."""
    head = ["--head", "--port=0", "--include-dashboard=false", f"--temp-dir={folder}/ray"]
    nodes = {names[0]: Node(names[0], folder, head, environment)}
    try:
        for name in names[1:]:
            nodes[name] = Node(name, folder, [f"--address={address(nodes[names[0]])}"], environment)
        yield nodes
    finally:
        for node in nodes.values():
            node.lose()


def address(head: Node) -> str:
    """Return host:port of the cluster."""
    words = (head.disk / "ray.log").read_text().split("--address='")
    return words[1].partition("'")[0]
