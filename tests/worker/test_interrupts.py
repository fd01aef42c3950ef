"""Ctrl-C, SIGTERM and SIGHUP sent to the real command, when libraries like to print tracebacks."""

import signal
import time
from pathlib import Path

import pytest

from lora_search.settings.schema import StudyConfig
from lora_search.study.study import SweepStudy
from tests.worker.test_faults import read_until, start


@pytest.mark.slow
def test_ctrl_c_while_torch_is_imported_leaves_at_once_without_a_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, python=["-X", "importtime"])
    read_until(process.stderr, " torch._utils\n")  # of the importing of torch, half is still to come
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "nothing is lost" in out
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_data_and_model_are_loaded_leaves_at_once(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path)
    read_until(process.stdout, ": reading")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "nothing is lost" in out
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_sigterm_finishes_the_pass_hands_back_and_a_second_signal_leaves_while_wandb_closes(
    tmp_path: Path,
) -> None:
    process = start(tmp_path, "tracker=wandb_offline", "train.epochs=20")
    read_until(process.stdout, "tokens/s")
    process.send_signal(signal.SIGTERM)
    read_until(process.stdout, "finishing the current pass")
    study = StudyConfig(name="smoke", storage=f"sqlite:///{tmp_path}/runs/lora_search.db")
    until = time.monotonic() + 60
    while any(row.state == "RUNNING" for row in SweepStudy.read(study)[0]) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in out + err
    rows, _ = SweepStudy.read(study)
    assert {row.state for row in rows} <= {"WAITING", "COMPLETE"}
    assert "WAITING" in {row.state for row in rows}


@pytest.mark.slow
def test_two_signals_at_once_leave_at_once_and_the_next_start_finds_the_trials(tmp_path: Path) -> None:
    process = start(tmp_path, "train.epochs=20")
    read_until(process.stdout, "tokens/s")
    process.send_signal(signal.SIGINT)
    read_until(process.stdout, "interrupt again to exit at once")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in out + err
