"""The offline files of W&B are read back and compared value by value; no network, no account."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from lora_search.errors import ConfigError
from lora_search.output.tracking import NoTracker, Tracker, make_tracker
from lora_search.settings.schema import StudyConfig, SweepConfig, TrackerConfig
from lora_search.trial import Measurement, StepRecord, TrialRun, TrialSettings

BLOCK_BYTES = 32768  # LevelDB's log format, behind a header of 7 bytes; wandb 0.31 has no reader in Python

SETTINGS = TrialSettings(
    r=8, alpha=16.0, dropout=0.05, target_modules=("q_proj", "v_proj"), use_rslora=False,
    lr=2.5e-4, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, max_grad_norm=1.0, schedule="cosine",
    warmup_ratio=0.05, batch_size=4, gradient_accumulation_steps=1, epochs=1, evals_per_epoch=2,
    early_stopping_patience=None,
)  # fmt: skip


def make_run(folder: Path, number: int = 0) -> TrialRun:
    return TrialRun(number=number, seed=100 + number, settings=SETTINGS, folder=str(folder / str(number)))


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


def values_of(items: object) -> dict[str, Any]:
    """Return the items of a history, config or summary record as a dict."""
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}  # type: ignore[attr-defined]


def wandb_files(folder: Path, number: int) -> list[Path]:
    """Return the .wandb files of one trial, oldest first."""
    return sorted((folder / str(number) / "wandb").glob("offline-run-*/*.wandb"))


def history(path: Path) -> list[dict[str, float]]:
    """Return the logged rows without W&B's own keys."""
    rows = [values_of(r.history.item) for r in read_records(path) if r.HasField("history")]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def summary(path: Path) -> dict[str, Any]:
    updates = [values_of(r.summary.update) for r in read_records(path) if r.HasField("summary")]
    return {key: value for update in updates for key, value in update.items()}


def run_id(path: Path) -> str:
    return str(next(r.run.run_id for r in read_records(path) if r.HasField("run")))


def measure(number: int, rung: int, perplexity: float, best: float | None = None) -> Measurement:
    """Return a rung of 8 examples, reached by two optimizer steps of 4."""
    steps = tuple(
        StepRecord(
            examples_seen=8 * (rung - 1) + n, loss=3.0 - rung / 7 - n / 9, lr=1e-4 * n, grad_norm=0.1 * n
        )
        for n in (4, 8)
    )
    return Measurement(
        trial_number=number, rung=rung, examples_seen=8 * rung, train_tokens=500 * rung, train_seconds=1.0,
        tokens_per_second=412.25 + rung, validation_loss=2.0 / rung, perplexity=perplexity, best_rung=rung,
        best_perplexity=perplexity if best is None else best, steps=steps,
    )  # fmt: skip


def rows_of(m: Measurement) -> list[dict[str, float]]:
    """Return the rows W&B should hold for a rung of two steps: the validation lies in the second one's."""
    first, second = [
        {
            "examples_seen": s.examples_seen,
            "train/loss": s.loss,
            "train/lr": s.lr,
            "train/grad_norm": s.grad_norm,
        }
        for s in m.steps
    ]
    rung = {
        "validation/loss": m.validation_loss,
        "validation/perplexity": m.perplexity,
        "train_tokens": m.train_tokens,
        "tokens_per_second": m.tokens_per_second,
    }
    return [first, second | rung]


def settings(name: str = "wandb_offline", project: str = "lora_search") -> SweepConfig:
    study = StudyConfig(name="faq.v2", storage="postgresql://me:S3CRET@host/db")
    return SweepConfig(study=study, tracker=TrackerConfig(name=name, project=project))


@pytest.fixture
def tracker() -> Tracker:
    return make_tracker(settings(), {"model": "tiny", "seed": 7})


def test_curves_of_two_live_trials_are_stored_value_by_value(tmp_path: Path, tracker: Tracker) -> None:
    rungs = [measure(0, 1, 9.5), measure(1, 1, 30.125), measure(0, 2, 8.25), measure(1, 2, 29.0)]
    tracker.start(make_run(tmp_path, 0))
    tracker.start(make_run(tmp_path, 1))

    for rung in rungs:
        tracker.log(rung)
    tracker.finish(0, "COMPLETE", "")
    tracker.finish(1, "PRUNED", "rung 2: 29.0 is above 9.1")
    tracker.close()

    (first,), (second,) = wandb_files(tmp_path, 0), wandb_files(tmp_path, 1)
    assert history(first) == rows_of(rungs[0]) + rows_of(rungs[2])
    assert history(second) == rows_of(rungs[1]) + rows_of(rungs[3])


def test_curves_are_drawn_against_examples_seen(tmp_path: Path, tracker: Tracker) -> None:
    tracker.start(make_run(tmp_path))
    tracker.log(measure(0, 1, 9.5))
    tracker.close()

    (path,) = wandb_files(tmp_path, 0)
    metrics = [r.metric for r in read_records(path) if r.HasField("metric")]
    assert [(m.name, m.glob_name, m.step_metric) for m in metrics] == [
        ("examples_seen", "", ""),
        ("", "*", "examples_seen"),
        ("validation/loss", "", "examples_seen"),
        ("validation/perplexity", "", "examples_seen"),
    ]
    assert [m.summary.min for m in metrics] == [False, False, True, True]


def test_two_studies_of_one_name_share_no_run(tmp_path: Path, tracker: Tracker) -> None:
    runs = [replace(make_run(tmp_path, number), study_id=study) for number, study in ((0, "aaa"), (1, "bbb"))]
    for run in (*runs, replace(make_run(tmp_path / "other", 0), number=2, study_id="bbb")):
        tracker.start(run)
    tracker.close()

    folders = sorted((tmp_path).rglob("*.wandb"))
    told = [next(r.run for r in read_records(path) if r.HasField("run")) for path in folders]
    assert {(run.run_id, run.display_name) for run in told} == {
        ("faq.v2-aaa-0", "faq.v2-0"), ("faq.v2-bbb-1", "faq.v2-1"), ("faq.v2-bbb-2", "faq.v2-2"),
    }  # fmt: skip


def test_a_run_is_named_after_its_study_and_trial_and_carries_all_settings(
    tmp_path: Path, tracker: Tracker
) -> None:
    tracker.start(make_run(tmp_path, 3))
    tracker.close()

    (path,) = wandb_files(tmp_path, 3)
    run = next(r.run for r in read_records(path) if r.HasField("run"))
    config = values_of(run.config.update)
    assert (run.run_id, run.run_group, run.job_type, run.project) == (
        "faq.v2-3",
        "faq.v2",
        "trial",
        "lora_search",
    )
    assert (config["lr"], config["r"], config["target_modules"]) == (2.5e-4, 8, ["q_proj", "v_proj"])
    assert (config["model"], config["trial"], config["seed"], config["trial_seed"]) == ("tiny", 3, 7, 103)


def test_the_summary_says_how_the_trial_ended_and_its_best(tmp_path: Path, tracker: Tracker) -> None:
    tracker.start(make_run(tmp_path))
    tracker.log(measure(0, 1, 9.5))
    tracker.log(measure(0, 2, 8.25))
    tracker.finish(0, "PRUNED", "rung 2: too high")
    tracker.close()

    (path,) = wandb_files(tmp_path, 0)
    stored = summary(path)
    assert (stored["state"], stored["reason"]) == ("PRUNED", "rung 2: too high")
    assert (stored["best_perplexity"], stored["best_rung"]) == (8.25, 2)


def test_only_a_failed_trial_is_a_failed_run(tmp_path: Path, tracker: Tracker) -> None:
    for number, state in enumerate(("COMPLETE", "PRUNED", "FAIL")):
        tracker.start(make_run(tmp_path, number))
        tracker.finish(number, state, "")
    tracker.close()

    ends = [list(read_records(wandb_files(tmp_path, number)[0]))[-1] for number in range(3)]
    assert [end.exit.exit_code for end in ends] == [0, 0, 1]


def test_a_resumed_trial_goes_on_under_the_same_id_where_it_stopped(tmp_path: Path) -> None:
    before = make_tracker(settings(), {})
    before.start(make_run(tmp_path))
    before.log(measure(0, 1, 9.5))
    before.close()
    (stopped,) = wandb_files(tmp_path, 0)
    kept = stopped.rename(
        tmp_path / stopped.name
    )  # W&B names folders by the second: the next may be the same

    after = make_tracker(settings(), {})
    after.start(make_run(tmp_path))
    after.log(measure(0, 2, 8.25))
    after.close()

    resumed = wandb_files(tmp_path, 0)[-1]
    assert run_id(kept) == run_id(resumed)
    assert history(kept) + history(resumed) == rows_of(measure(0, 1, 9.5)) + rows_of(measure(0, 2, 8.25))
    assert summary(kept)["state"] == "INTERRUPTED"


def test_a_diverged_rung_is_stored_as_nan_and_never_as_the_best(tmp_path: Path, tracker: Tracker) -> None:
    tracker.start(make_run(tmp_path))
    tracker.log(measure(0, 1, 9.5))
    tracker.log(measure(0, 2, float("nan"), best=9.5))
    tracker.finish(0, "FAIL", "loss is not finite")
    tracker.close()

    (path,) = wandb_files(tmp_path, 0)
    assert str(history(path)[-1]["validation/perplexity"]) == "nan"
    assert summary(path)["best_perplexity"] == 9.5


def run_program(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with this module's builders at hand and nobody logged in to W&B."""
    prelude = "from tests.output.test_tracking import *\n"
    keep = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", prelude + code, *arguments],
        capture_output=True, text=True, timeout=60, env=keep | {"NETRC": os.devnull} | environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_no_file_holds_the_storage_password_and_the_terminal_stays_clean(tmp_path: Path) -> None:
    code = (
        "tracker = make_tracker(settings(), {})\n"
        f"tracker.start(make_run(Path({str(tmp_path)!r})))\n"
        "tracker.log(measure(0, 1, 9.5))\n"
        "tracker.finish(0, 'COMPLETE', '')\n"
    )
    done = run_program(code, "study.storage=postgresql://me:S3CRET@host/db")

    files = [path for path in (tmp_path / "0").rglob("*") if path.is_file()]
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(files) >= 2
    assert not any(b"S3CRET" in path.read_bytes() for path in files)


def service() -> int:
    """Return the id of W&B's own process."""
    threads = Path(f"/proc/{os.getpid()}/task").iterdir()
    children = [pid for thread in threads for pid in (thread / "children").read_text().split()]
    (found,) = [pid for pid in children if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]
    return int(found)


def test_trials_survive_the_death_of_the_service_with_one_warning(tmp_path: Path) -> None:
    code = f"""
import logging, signal
logging.basicConfig(format="%(message)s")
tracker = make_tracker(settings(), {{}})
tracker.start(make_run(Path({str(tmp_path)!r}), 0))
os.kill(service(), signal.SIGKILL)
for rung in range(1, 50):
    tracker.log(measure(0, rung, 9.5))
tracker.start(make_run(Path({str(tmp_path)!r}), 1))
tracker.log(measure(1, 1, 9.5))
tracker.finish(0, "COMPLETE", "")
tracker.close()
print("trained to the end")
"""
    done = run_program(code)

    assert (done.returncode, done.stdout) == (0, "trained to the end\n")
    first, last = done.stderr.splitlines()
    assert "Training continues" in first
    assert "calls failed and 1 run files are not whole" in last
    assert "the study and the report are complete" in last


def test_online_without_a_login_is_refused_with_the_remedy(tmp_path: Path) -> None:
    code = "try:\n    make_tracker(settings('wandb'), {})\nexcept ConfigError as error:\n    print(error)\n"
    done = run_program(code, HOME=str(tmp_path))

    assert done.stdout == (
        "tracker.name: needs a W&B login, got 'wandb'. Run `wandb login` or set WANDB_API_KEY. "
        "Or keep tracker=wandb_offline and run `wandb sync` later.\n"
    )


def test_a_missing_wandb_package_is_refused_with_the_remedy() -> None:
    code = (
        "sys.modules['wandb'] = None\n"
        "try:\n    make_tracker(settings(), {})\nexcept ConfigError as error:\n    print(error)\n"
    )
    done = run_program(code)

    assert "tracker.name: needs the wandb package" in done.stdout
    assert "pip install wandb" in done.stdout


def test_a_first_run_that_cannot_open_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tracker = make_tracker(settings(), {})

    with pytest.raises(ConfigError, match=r"tracker.name: W&B did not start .*Not a directory"):
        tracker.start(make_run(tmp_path / "file"))


def test_none_tracks_nothing(tmp_path: Path) -> None:
    tracker = make_tracker(settings("none"), {})
    tracker.start(make_run(tmp_path))
    tracker.log(measure(0, 1, 9.5))
    tracker.finish(0, "COMPLETE", "")
    tracker.close()

    assert isinstance(tracker, NoTracker)
    assert list(tmp_path.iterdir()) == []
