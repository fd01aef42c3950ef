"""runs/<study>/sweep.log keeps what was said, over all starts, fit to be read and passed on."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from lora_search.output.terminal import Progress
from lora_search.settings.secrets import remember_secret
from tests.output.test_terminal import SUMMARY, Clock, slot, terminal


def lines_of(folder: Path) -> list[str]:
    return (folder / "sweep.log").read_text(encoding="utf-8").splitlines()


def test_what_was_said_before_there_is_a_folder_comes_first(tmp_path: Path) -> None:
    progress = Progress(terminal(80), Clock())
    progress.event("sweep smoke")

    progress.log.open(tmp_path)
    progress.event("study smoke: 0 of 8 trials done")

    began, *said = lines_of(tmp_path)
    assert began.startswith("--- 20")
    assert said == ["[ 0:00] sweep smoke", "[ 0:00] study smoke: 0 of 8 trials done"]


def test_a_later_start_adds_to_it(tmp_path: Path) -> None:
    for number in range(2):
        progress = Progress(terminal(80), Clock())
        progress.log.open(tmp_path)
        progress.event(f"start {number}")

    assert [line[8:] for line in lines_of(tmp_path) if line.startswith("[")] == ["start 0", "start 1"]
    assert sum(line.startswith("---") for line in lines_of(tmp_path)) == 2


def test_it_holds_no_password_and_no_control_sequence(tmp_path: Path) -> None:
    remember_secret("hunter2-of-the-log")
    progress = Progress(terminal(80), Clock())
    progress.log.open(tmp_path)

    progress.event("a \x1b[31mred\x1b[0m row says hunter2-of-the-log")
    progress.refuse(ValueError("no answer from hunter2-of-the-log"))

    text = (tmp_path / "sweep.log").read_text()
    assert "hunter2-of-the-log" not in text
    assert "a \\x1b[31mred\\x1b[0m row says ***" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_state_is_noted_every_half_minute_with_and_without_a_terminal(
    tmp_path: Path, is_terminal: bool
) -> None:
    clock = Clock()
    with Progress(terminal(80, is_terminal), clock) as progress:
        progress.log.open(tmp_path)
        for _ in range(62):
            progress.update([slot(3, 1)], SUMMARY, 412.3)
            clock.now += 1.0

    states = [line for line in lines_of(tmp_path) if "5/12 trials" in line]
    assert [line[:7] for line in states] == ["[ 0:00]", "[ 0:30]", "[ 1:00]"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "sweep.log").mkdir()
    console = Console(file=io.StringIO(), width=80)
    progress = Progress(console, Clock())

    progress.log.open(tmp_path)
    progress.event("goes on")

    assert isinstance(console.file, io.StringIO)
    assert "goes on" in console.file.getvalue()
