"""A winner trained again by the command that its folder prints."""

import json
import re
import shlex
from pathlib import Path

import pytest

from lora_search.settings.schema import StudyConfig
from lora_search.study.study import SweepStudy
from tests.commands import TINY, run_sweep


def curves(folder: Path, study: str) -> dict[int, dict[int, float]]:
    rows, _ = SweepStudy.read(StudyConfig(name=study, storage=f"sqlite:///{folder}/runs/lora_search.db"))
    return {row.number: row.perplexities for row in rows}


def printed_command(folder: Path) -> list[str]:
    (command,) = re.findall(r"```sh\n(.*?)\n```", (folder / "reproduce.md").read_text(), re.DOTALL)[-1:]
    return shlex.split(command)[3:]


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_a_winner_trained_again_has_the_same_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    mine = [*TINY, "study.n_trials=3", f"engine.slots={slots}", "optim.lr=5e-3", "engine.tokens_per_pass=512"]
    assert run_sweep(monkeypatch, tmp_path, *mine) == 0
    best = json.loads((tmp_path / "runs/smoke/best/settings.json").read_text())
    again = [*mine, *printed_command(tmp_path / "runs/smoke/best")]

    assert run_sweep(monkeypatch, tmp_path, *again) == 0
    assert run_sweep(monkeypatch, tmp_path, *again, "study.name=other", "train.seed=1") == 0

    won = curves(tmp_path, "smoke")[best["trial"]]
    (repeated,) = curves(tmp_path, f"smoke-trial-{best['trial']}").values()
    (other,) = curves(tmp_path, "other").values()
    assert repeated == (won if slots == 1 else pytest.approx(won, rel=1e-5))
    assert other != pytest.approx(won, rel=1e-5)
