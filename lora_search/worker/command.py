"""The command line of a sweep, and of the worker processes that it starts.

A worker gets its settings, which may contain passwords, on its standard input: all users can read command
lines, and the user's own processes each other's environment.
"""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

WORKER_KEY = "launcher.worker="
LETTER_VARIABLE = "LORA_SEARCH_LETTER"  # set: the first line of standard input is a Letter


@dataclass(frozen=True, kw_only=True)
class Letter:
    """What a launcher tells its worker."""

    overrides: tuple[str, ...] = ()
    typed: str = ""  # the command that the user typed
    error_file: str | None = None  # for the error that ends the worker
    environment: Mapping[str, str] = field(default_factory=dict)  # where the worker's own lacks it


@dataclass(frozen=True, kw_only=True)
class Command:
    """The sweep as requested on the command line."""

    sweep: str
    config_dir: str | None
    overrides: tuple[str, ...]
    typed: str = ""

    def for_worker(self, number: int, config_dir: Path | None = None) -> list[str]:
        """Return the command line of a worker. It contains no settings: a worker needs a `letter` too."""
        folder = config_dir or self.config_dir
        options = ["-cn", self.sweep, *([] if folder is None else ["-cd", str(folder)])]
        return [sys.executable, "-m", "lora_search.sweep", *options, f"{WORKER_KEY}{number}"]

    def letter(self, error_file: Path, environment: Mapping[str, str] | None = None) -> bytes:
        """Return what to write to a worker's standard input, which it expects with LETTER_VARIABLE set."""
        given, file = environment or {}, str(error_file)
        letter = Letter(overrides=self.overrides, typed=self.typed, error_file=file, environment=given)
        return json.dumps(asdict(letter)).encode() + b"\n"


@cache
def received() -> Letter:
    """Return the launcher's letter, read once; an empty one if no launcher started this process. Sets the
    environment variables in it."""
    if os.environ.pop(LETTER_VARIABLE, None) is None:
        return Letter()
    content = json.loads(read_line(0))
    letter = Letter(**{**content, "overrides": tuple(content["overrides"])})
    for name, value in letter.environment.items():
        os.environ.setdefault(name, value)
    return letter


def read_line(descriptor: int) -> bytes:
    """Return the first line; nothing after it is taken. A launcher that has died leaves it empty."""
    line = b""
    while (one := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += one
    return line or b'{"overrides": []}'


def typed_command(argv: Sequence[str], letter: Letter | None = None) -> str:
    """Return the command that the user typed to start this process or its launcher."""
    told = (letter or received()).typed
    return told or shlex.join(["python", "-m", "lora_search.sweep", *argv[1:]])
