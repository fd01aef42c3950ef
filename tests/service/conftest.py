"""One finished smoke sweep serves all tests of what follows a search."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_search import sweep

ARGUMENTS = ["-cn", "smoke", "engine.device=cpu", "study.n_trials=4", "optim.lr=5e-3", "pruner=none"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished smoke sweep; tests add to it, and change nothing of the search."""
    folder = tmp_path_factory.mktemp("service")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["sweep", *ARGUMENTS])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            assert sweep.main() == 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    return folder


@pytest.fixture
def typed(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs a command's main as if it was typed where the sweep ran."""
    monkeypatch.chdir(finished)

    def run(main: Callable[[], int], *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["command", "study.name=smoke", *arguments])
        return main()

    return run
