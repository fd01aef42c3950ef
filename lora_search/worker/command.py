"""The command line of a sweep, and of the worker processes that it starts."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_search.settings.secrets import redact

STORAGE_VARIABLE = "LORA_SEARCH_STORAGE"
WORKER_KEY = "launcher.worker="


@dataclass(frozen=True, kw_only=True)
class Command:
    """The sweep as it was asked for."""

    sweep: str
    config_dir: Path | None
    overrides: tuple[str, ...]

    def for_worker(self, number: int) -> list[str]:
        """Return the command line of a worker, without the storage URL."""
        folder = [] if self.config_dir is None else ["-cd", str(self.config_dir)]
        own = [_without_password(text) for text in self.overrides]
        storage = f"study.storage=${{oc.env:{STORAGE_VARIABLE}}}"
        added = [f"{WORKER_KEY}{number}", storage]
        return [sys.executable, "-m", "lora_search.sweep", "-cn", self.sweep, *folder, *own, *added]


def typed_command(argv: Sequence[str]) -> str:
    """Return what a person typed to get this process, without what `Command.for_worker` added."""
    added = next((i for i, text in enumerate(argv) if text.startswith(WORKER_KEY)), len(argv))
    return shlex.join(["python", "-m", "lora_search.sweep", *argv[1:added]])


def _without_password(override: str) -> str:
    key = override.partition("=")[0].lstrip("+~")
    return redact(override) if key.startswith("study") else override
