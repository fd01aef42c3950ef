"""Shared parts: tiny random chat models made on the spot, and the settings of one trial; which tests run.

`pytest` runs the fast tests; `pytest --slow` and `pytest FILE` run the slow ones as well.
"""

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_search.model.tiny import make_tiny_model
from lora_search.settings import secrets
from lora_search.trial import TrialRun, TrialSettings
from tests.commands import SMOKE, run_sweep
from tests.servers import MARIADB

SETTINGS = TrialSettings(
    r=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj"), use_rslora=False,
    lr=5e-3, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-8, max_grad_norm=1.0, schedule="cosine",
    warmup_ratio=0.1, batch_size=2, gradient_accumulation_steps=2, epochs=2, evals_per_epoch=2,
    early_stopping_patience=None,
)  # fmt: skip


def make_run(folder: Path, number: int = 0, **changes: object) -> TrialRun:
    """Return a trial with some settings changed."""
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    return TrialRun(number=number, seed=100 + number, settings=settings, folder=str(folder / str(number)))


@pytest.fixture(autouse=True)
def own_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's secrets are its own: a random password of one may be a word in another's message."""
    monkeypatch.setattr(secrets, "_known", set())


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def smoke_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished smoke sweep of four trials. Tests change only copies of it."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        assert run_sweep(patch, folder, *SMOKE) == 0
    return folder


@pytest.fixture
def typed(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that runs a command's main as if it was typed where the sweep of the module's ``finished``
    ran."""
    monkeypatch.chdir(finished)

    def run(main: Callable[[], int], *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["command", "study.name=smoke", *arguments])
        return main()

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")


def pytest_configure(config: pytest.Config) -> None:
    """Leave the slow tests out, unless they are asked for: by --slow, by a file's name or by -m."""
    names_a_file = any(".py" in argument for argument in config.args)
    if not (config.option.slow or config.option.markexpr or names_a_file):
        config.option.markexpr = "not slow"
    _answer_signals()


def _answer_signals() -> None:
    """Undo what nohup or a shell's & ignores: a process that a test starts would inherit it, and ignore the
    Ctrl-C that the test sends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("mysql") and MARIADB is None:
        pytest.skip("no wheel carries a MariaDB server: apt install mariadb-server")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
