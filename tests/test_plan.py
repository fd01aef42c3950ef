"""The forecast as users run it: seconds, no study, and beside the truth at the sweep's end."""

import sys
from pathlib import Path

import pytest

from lora_search import plan, sweep

TINY = ["-cn", "smoke", "engine.device=cpu", "study.n_trials=3"]


def test_a_plan_makes_no_study_and_the_sweep_compares_it_with_the_truth(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(sys, "argv", ["plan", *TINY, "study.max_hours=1", "study.price_per_hour=2"])

    assert plan.main() == 0

    said = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["smoke.plan.json"]
    for head in ("probe ", "one trial ", "the sweep ", "cost ", "disk ", "memory ", "budget "):
        assert f"\n{head}" in said

    monkeypatch.setattr(sys, "argv", ["sweep", *TINY])
    assert sweep.main() == 0

    assert "forecast of time: " in capsys.readouterr().out
    assert "forecast of tokens" in (tmp_path / "runs/smoke/report.html").read_text()


def test_a_plan_over_two_devices_says_what_the_fullest_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two devices that are parts of the CPU: all but their memory is as it is with GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("accelerate.utils.modeling.check_device_same", lambda a, b: a.type == b.type)
    two = ["engine.device=auto", "engine.devices_per_worker=2", "engine.slots=auto"]
    monkeypatch.setattr(sys, "argv", ["plan", *TINY, *two])

    assert plan.main() == 0

    assert "GiB at the probe's peak, base included, on the fullest of 2 GPUs" in capsys.readouterr().out


def test_sizes_are_probed_with_all_that_some_trial_of_the_space_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.1)
    auto = ["engine.slots=auto", "engine.tokens_per_pass=auto", "lora.trainable_token_indices=[5,6,7]"]
    space = ["lora.trainable_token_indices=choice([5],[6])", "lora.init=choice(kaiming,olora)"]
    monkeypatch.setattr(sys, "argv", ["plan", *TINY, *auto, *space])

    assert plan.main() == 0

    assert "tokens per pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=-1"], "optim.lr: must be between 0 and 1"),
        (
            ["model.quantization=nf4", "lora.init=choice(kaiming,olora)"],
            "lora.init: cannot be pissa or olora over model.quantization=nf4, whose weights have no exact "
            "factors, got 'olora'. Set model.quantization=null, or lora.init=kaiming",
        ),
    ],
)
def test_a_plan_of_wrong_settings_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan", *TINY, *overrides])

    assert plan.main() == 2

    assert message in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()
