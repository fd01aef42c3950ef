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
    """The sweep as requested on the command line."""

    sweep: str
    config_dir: Path | None
    overrides: tuple[str, ...]

    def for_worker(self, number: int) -> list[str]:
        """Return the command line of a worker. It contains no settings, since `ps` shows it to all users; a
        worker needs `environment` too."""
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
        """Return the environment variable with a worker's settings."""
        return {OVERRIDES_VARIABLE: json.dumps(self.overrides)}


def given_overrides(typed: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the overrides of a command line; a worker gets most of them from its environment."""
    is_worker = any(text.startswith(WORKER_KEY) for text in typed)
    inherited = json.loads(environment.get(OVERRIDES_VARIABLE, "[]")) if is_worker else []
    return [*inherited, *typed]


def typed_command(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Return the command that the user typed to start this process or its launcher."""
    worker = next((i for i, text in enumerate(argv) if text.startswith(WORKER_KEY)), None)
    given = given_overrides(argv[1:], environment) if worker is None else argv[1:worker]
    own = [] if worker is None else given_overrides(argv[worker:], environment)[:-1]
    return shlex.join(["python", "-m", "lora_search.sweep", *given, *own])
