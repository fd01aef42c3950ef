"""`lora_search.sweep` in this process, as a command line would run it. Imports no torch."""

import signal
import sys
from pathlib import Path

import pytest

from lora_search import sweep

TINY = ["-cn", "smoke", "engine.device=cpu"]
SMOKE = [*TINY, "study.n_trials=4", "optim.lr=5e-3", "pruner=none"]


def run_sweep(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """Return the exit code of a sweep that was started in the folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return sweep.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
