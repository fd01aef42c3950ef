"""One finished smoke sweep serves all tests of what follows a search."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def finished(smoke_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished sweep; tests add to it, and change nothing of the search."""
    folder = tmp_path_factory.mktemp("service")
    shutil.copytree(smoke_sweep / "runs", folder / "runs")
    return folder
