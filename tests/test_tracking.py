"""The offline files of W&B are read back and compared value by value; no network, no account."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from lora_search.config import StudyConfig, SweepConfig, TrackerConfig
from lora_search.errors import ConfigError
from lora_search.tracking import NoTracker, Tracker, make_tracker
from lora_search.trial import Measurement, StepRecord
from tests.conftest import make_run

BLOCK_BYTES = 32768  # LevelDB's log format, behind a header of 7 bytes


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a .wandb file."""
    raw, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(raw):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < 7:
            position += left
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", raw, position)
        message += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(message)
            message = b""


def values_of(items: object) -> dict[str, object]:
    """Return the items of a history, config or summary record as a dict."""
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}  # type: ignore[attr-defined]


def wandb_files(folder: Path, number: int) -> list[Path]:
    """Return the .wandb files of one trial, oldest first."""
    return sorted((folder / str(number) / "wandb").glob("offline-run-*/*.wandb"))


def history(path: Path) -> list[dict[str, object]]:
    """Return the logged rows without W&B's own keys."""
    rows = [values_of(r.history.item) for r in read_records(path) if r.HasField("history")]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def summary(path: Path) -> dict[str, object]:
    updates = [values_of(r.summary.update) for r in read_records(path) if r.HasField("summary")]
    return {key: value for update in updates for key, value in update.items()}


def opened(path: Path) -> Record:
    return next(r for r in read_records(path) if r.HasField("run"))


def measure(number: int, rung: int, perplexity: float) -> Measurement:
    """Return a rung of 8 examples, reached by two optimizer steps of 4."""
    seen = 8 * (rung - 1)
    steps = tuple(StepRecord(examples_seen=seen + n, loss=3.0 - rung / 7 - n / 9, lr=1e-4 * n, grad_norm=0.1 * n) for n in (4, 8))
    return Measurement(
        trial_number=number, rung=rung, examples_seen=8 * rung, train_tokens=500 * rung, train_seconds=1.0,
        tokens_per_second=412.25 + rung, validation_loss=2.0 / rung, perplexity=perplexity, best_rung=rung,
        best_perplexity=perplexity, steps=steps,
    )  # fmt: skip


def rows_of(m: Measurement) -> list[dict[str, object]]:
    """Return the rows W&B should hold for a rung of two steps: the validation lies in the second one's."""
    first, second = (
        {"examples_seen": s.examples_seen, "train/loss": s.loss, "train/lr": s.lr, "train/grad_norm": s.grad_norm}
        for s in m.steps
    )
    rung = {
        "validation/loss": m.validation_loss,
        "validation/perplexity": m.perplexity,
        "tokens_per_second": m.tokens_per_second,
    }
    return [first, second | rung]


def settings(name: str = "wandb_offline", project: str = "lora_search") -> SweepConfig:
    study = StudyConfig(name="faq.v2", storage="postgresql://me:S3CRET@host/db")
    return SweepConfig(study=study, tracker=TrackerConfig(name=name, project=project))


@pytest.fixture
def tracker() -> Iterator[Tracker]:
    tracker = make_tracker(settings(), {"model": "tiny", "seed": 7})
    yield tracker
    tracker.close()


def test_curves_of_two_live_trials_are_stored_value_by_value(tmp_path: Path, tracker: Tracker) -> None:
    curves = {0: [measure(0, 1, 9.5), measure(0, 2, 8.25)], 1: [measure(1, 1, 30.125), measure(1, 2, 29.0)]}
    tracker.start(make_run(tmp_path, 0))
    tracker.start(make_run(tmp_path, 1))

    for pair in zip(curves[0], curves[1], strict=True):
        for m in pair:
            tracker.log(m)
    tracker.finish(0, "COMPLETE", "")
    tracker.finish(1, "PRUNED", "rung 2: 29.0 is above 9.1")

    (first,), (second,) = wandb_files(tmp_path, 0), wandb_files(tmp_path, 1)
    assert history(first) == rows_of(curves[0][0]) + rows_of(curves[0][1])
    assert history(second) == rows_of(curves[1][0]) + rows_of(curves[1][1])


def test_curves_are_drawn_against_examples_seen(tmp_path: Path, tracker: Tracker) -> None:
    tracker.start(make_run(tmp_path))
    tracker.log(measure(0, 1, 9.5))
    tracker.finish(0, "COMPLETE", "")

    (path,) = wandb_files(tmp_path, 0)
    metrics = [r.metric for r in read_records(path) if r.HasField("metric")]
    assert [(m.name or m.glob_name, m.step_metric) for m in metrics] == [("examples_seen", ""), ("*", "examples_seen")]


def test_a_run_is_named_after_its_study_and_trial_and_carries_all_settings(tmp_path: Path, tracker: Tracker) -> None:
    tracker.start(make_run(tmp_path, 3, lr=2.5e-4))
    tracker.finish(3, "COMPLETE", "")

    (path,) = wandb_files(tmp_path, 3)
    run = opened(path).run
    config = values_of(run.config.update)
    assert (run.run_id, run.run_group, run.job_type, run.project) == ("faq.v2-3", "faq.v2", "trial", "lora_search")
    assert config["lr"] == 2.5e-4
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["model"] == "tiny"
    assert (config["trial"], config["seed"], config["trial_seed"]) == (3, 7, 103)


def test_the_summary_says_how_the_trial_ended_and_its_best(tmp_path: Path, tracker: Tracker) -> None:
    tracker.start(make_run(tmp_path))
    tracker.log(measure(0, 1, 9.5))
    tracker.log(measure(0, 2, 8.25))
    tracker.finish(0, "PRUNED", "rung 2: too high")

    (path,) = wandb_files(tmp_path, 0)
    stored = summary(path)
    assert (stored["state"], stored["reason"]) == ("PRUNED", "rung 2: too high")
    assert (stored["best_perplexity"], stored["best_rung"]) == (8.25, 2)


def test_only_a_failed_trial_is_a_failed_run(tmp_path: Path, tracker: Tracker) -> None:
    for number, state in enumerate(("COMPLETE", "PRUNED", "FAIL")):
        tracker.start(make_run(tmp_path, number))
        tracker.finish(number, state, "")

    records = [list(read_records(wandb_files(tmp_path, number)[0])) for number in range(3)]
    assert [rs[-1].exit.exit_code for rs in records] == [0, 0, 1]


def test_a_resumed_trial_goes_on_under_the_same_id_where_it_stopped(tmp_path: Path) -> None:
    before, after = make_tracker(settings(), {}), make_tracker(settings(), {})
    before.start(make_run(tmp_path))
    before.log(measure(0, 1, 9.5))
    before.close()
    kept = tmp_path / "kept" / "wandb" / "offline-run-first"
    kept.parent.mkdir(parents=True)
    next((tmp_path / "0" / "wandb").iterdir()).rename(kept)  # W&B names folders by the second

    after.start(make_run(tmp_path))
    after.log(measure(0, 2, 8.25))
    after.finish(0, "COMPLETE", "")

    (first,), (second,) = wandb_files(tmp_path, "kept"), wandb_files(tmp_path, 0)
    assert opened(first).run.run_id == opened(second).run.run_id
    assert history(first) + history(second) == rows_of(measure(0, 1, 9.5)) + rows_of(measure(0, 2, 8.25))
    assert summary(first)["state"] == "INTERRUPTED"


def test_a_diverged_rung_is_stored_as_nan_and_never_as_the_best(tmp_path: Path, tracker: Tracker) -> None:
    tracker.start(make_run(tmp_path))
    tracker.log(measure(0, 1, 9.5))
    tracker.log(measure(0, 2, float("nan"), best=9.5))
    tracker.finish(0, "FAIL", "loss is not finite")

    (path,) = wandb_files(tmp_path, 0)
    assert str(history(path)[-1]["validation/perplexity"]) == "nan"
    assert summary(path)["best_perplexity"] == 9.5


def test_no_file_holds_the_storage_password_or_the_command_line(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(
        "from pathlib import Path\nfrom tests.conftest import make_run\nfrom tests.test_tracking import settings\n"
        "from lora_search.tracking import make_tracker\n"
        f"tracker = make_tracker(settings(), {{}})\ntracker.start(make_run(Path({str(tmp_path)!r})))\n"
        "tracker.finish(0, 'COMPLETE', '')\n"
    )
    command = [sys.executable, str(program), "study.storage=postgresql://me:S3CRET@host/db"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": os.getcwd()})

    files = [path for path in (tmp_path / "0").rglob("*") if path.is_file()]
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(files) >= 2
    assert not any(b"S3CRET" in path.read_bytes() for path in files)
