"""W&B offline files, read back with W&B's own reader."""

import json
import math
import struct
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from lora_search.config import StudyConfig, SweepConfig, TrackerConfig
from lora_search.tracking import make_tracker
from lora_search.trial import Measurement, StepRecord
from tests.conftest import make_run


def payloads(content: bytes) -> list[bytes]:
    """Return the records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    found, pending, offset = [], b"", 7
    while offset + 7 <= len(content):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        length, kind = struct.unpack_from("<HB", content, offset + 4)
        if kind == 0:
            break
        pending += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(pending)
            pending = b""
    return found


def read_back(folder: Path) -> tuple[list[dict[str, object]], list[wandb_internal_pb2.Record]]:
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = [wandb_internal_pb2.Record.FromString(payload) for payload in payloads(file.read_bytes())]
    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    return history, records


def measurement(number: int) -> Measurement:
    steps = tuple(
        StepRecord(examples_seen=4 * i, loss=2.0 / i, lr=1e-3 * i, grad_norm=0.5) for i in (1, 2, 3)
    )
    return Measurement(
        trial_number=number, rung=1, examples_seen=12, train_tokens=99, train_seconds=1.5, tokens_per_second=66.0,
        validation_loss=math.log(9 + number), perplexity=9.0 + number, best_rung=1, best_perplexity=9.0 + number, steps=steps,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_two_live_trials_have_their_own_runs_and_curves(tmp_path: Path) -> None:
    config = SweepConfig(study=StudyConfig(name="mine"), tracker=TrackerConfig(name="wandb_offline"))
    tracker = make_tracker(config, {"model": "tiny"})
    runs = [make_run(tmp_path, number) for number in (0, 1)]
    for run in runs:
        tracker.start(run)

    for run in runs:
        tracker.log(measurement(run.number))
    tracker.finish(0, "COMPLETE", "")
    tracker.finish(1, "PRUNED", "rung 1: too slow")

    for run in runs:
        history, records = read_back(Path(run.folder))
        assert [row["train/loss"] for row in history if "train/loss" in row] == [2.0, 1.0, 2.0 / 3]
        assert [row["examples_seen"] for row in history] == [4, 8, 12, 12]
        assert [row["validation/perplexity"] for row in history if "validation/perplexity" in row] == [
            9.0 + run.number
        ]
        info = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        assert (info.run_id, info.run_group, info.job_type) == (f"mine-{run.number}", "mine", "trial")


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    tracker = make_tracker(SweepConfig(tracker=TrackerConfig(name="none")), {})

    tracker.start(make_run(tmp_path, 0))
    tracker.log(measurement(0))
    tracker.close()

    assert list(tmp_path.iterdir()) == []
