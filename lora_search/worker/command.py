"""The command line of a sweep, and of the worker processes that it starts."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OVERRIDES_VARIABLE = "LORA_SEARCH_OVERRIDES"
WORKER_KEY = "launcher.worker="


@dataclass(frozen=True, kw_only=True)
class Command:
    """The sweep as it was asked for."""

    sweep: str
    config_dir: Path | None
    overrides: tuple[str, ...]

    def for_worker(self, number: int) -> list[str]:
        """Return the command line of a worker: no setting of the user's is on it, for `ps` shows it to
        everybody. It needs `environment` too."""
        folder = [] if self.config_dir is None else ["-cd", str(self.config_dir)]
        return [
            sys.executable,
            "-m",
            "lora_search.sweep",
            "-cn",
            self.sweep,
            *folder,
            f"{WORKER_KEY}{number}",
        ]

    def environment(self) -> dict[str, str]:
        """Return the variable that gives a worker its settings."""
        return {OVERRIDES_VARIABLE: json.dumps(self.overrides)}


def given_overrides(typed: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return what a command line sets; a worker's launcher has given it the most by environment."""
    is_worker = any(text.startswith(WORKER_KEY) for text in typed)
    inherited = json.loads(environment.get(OVERRIDES_VARIABLE, "[]")) if is_worker else []
    return [*inherited, *typed]


def typed_command(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Return what a person typed to get this process, or to get its launcher."""
    worker = next((i for i, text in enumerate(argv) if text.startswith(WORKER_KEY)), None)
    given = given_overrides(argv[1:], environment) if worker is None else argv[1:worker]
    own = [] if worker is None else given_overrides(argv[worker:], environment)[:-1]
    return shlex.join(["python", "-m", "lora_search.sweep", *given, *own])
