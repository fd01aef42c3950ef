"""`lora-search COMMAND` is `python -m lora_search.COMMAND`, and finds a study by its name alone."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lora_search import cli, confirm, export, final, generate, report, status
from tests.study.test_study import make_config, open_study

PACKAGE = Path(cli.__file__).parent


def test_the_table_names_every_command_that_there_is() -> None:
    runnable = [p.stem for p in PACKAGE.glob("*.py") if '__name__ == "__main__"' in p.read_text()]

    assert sorted(cli.COMMANDS) == sorted({*runnable} - {"cli"})
    assert len(cli.COMMANDS) >= 2


def test_the_help_lists_each_command_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == cli.run(["--help"]) == 0

    page = capsys.readouterr().out
    for name, purpose in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(purpose)}$", page, re.MULTILINE)


def test_the_help_imports_no_library() -> None:
    code = (
        "import sys; from lora_search.cli import run; run(['--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'hydra', 'optuna', 'rich')))"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_an_unknown_command_is_answered_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["swep"]) == 2

    assert "lora-search 'swep': no such command. There are: sweep, " in capsys.readouterr().err


def test_a_command_leaves_with_its_own_exit_code_and_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora-search", "report", "study.nam=x"])
    monkeypatch.delitem(sys.modules, "lora_search.report")  # as in a process of its own

    with pytest.raises(SystemExit) as left:
        cli.main()

    assert left.value.code == 2
    assert "study.nam: there is no such setting. Did you mean study.name" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "key", "told"),
    [
        (confirm, "confirm.tops", "this command has no such key. Did you mean confirm.top?"),
        (confirm, "top", "this command has no such key. Did you mean confirm.top?"),
        (final, "seed", "this command has no such key. Did you mean seeds?"),
        (generate, "max_tokens", "this command has no such key. Did you mean max_new_tokens?"),
        (export, "top", "there is no such setting. See --help."),
        (
            final,
            "train.epochs",
            "the study has recorded its own, which counts. Leave it out: only study.*, runs_dir",
        ),
        (export, "++lora.r", "the study has recorded its own"),
        (report, "data", "the study has recorded its own"),
        (status, "engine", "the study has recorded its own"),
    ],
)
def test_a_key_that_a_command_does_not_take_is_refused_with_the_right_one(
    command: ModuleType, key: str, told: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command.__name__, "study.name=x", f"{key}=2"])

    assert command.main() == 2

    said = " ".join(capsys.readouterr().out.split())
    assert f"{key}: {told}" in said
    assert not list(tmp_path.iterdir())


def test_a_study_is_found_by_its_name_and_storage_alone_wherever_the_options_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    study = open_study(make_config(tmp_path, storage=f"sqlite:///{tmp_path}/own.db"), tmp_path)
    study.remember("base_perplexity", lambda: "300.0")
    storage = f"study.storage=sqlite:///{tmp_path}/own.db"

    for arguments in (["study.name=s", storage], ["study.name=s", "-cn", "smoke", storage]):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        assert report.main() == 0, capsys.readouterr().out
        (tmp_path / "runs/s/report.html").unlink()


def test_a_terminal_sees_at_once_that_a_command_has_begun(tmp_path: Path) -> None:
    ours, its = os.openpty()
    command = [sys.executable, "-m", "lora_search.status", "--help"]

    subprocess.run(command, stdout=its, stderr=its, cwd=tmp_path, check=True)

    os.close(its)
    shown = os.read(ours, 4096)
    os.close(ours)
    assert shown.startswith(b"lora-search status ...\r\x1b[Kusage: lora-search status")
