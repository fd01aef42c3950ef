"""The live table shows what is searched, and fits."""

import pytest

from lora_search.output.slot_table import slot_table
from tests.output.test_leaderboard import KEYS
from tests.output.test_terminal import drawn, slot


def test_it_shows_the_settings_that_are_searched() -> None:
    head, row = drawn(slot_table([slot(3, 1)], ["optim.warmup_ratio", "lora.dropout"]))

    assert head.split()[:6] == ["trial", "warmup_ratio", "dropout", "loss", "perplexity", "rung"]
    assert row.split()[:6] == ["3", "0.05", "0.05", "2.250", "9.500", "1/12"]


def test_without_a_search_it_shows_the_usual_settings() -> None:
    head, row = drawn(slot_table([slot(3, 1)]))

    assert head.split()[1:6] == ["r", "alpha", "lr", "batch", "targets"]
    assert row.split()[1:6] == ["8", "16", "2.13e-4", "16x4", "q,v"]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_eleven_searched_settings_fit_or_are_named(width: int) -> None:
    table = slot_table([slot(3, 1), slot(11, 0)], KEYS, width)

    lines = drawn(table, width)
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert "perplexity" in lines[0]
    shown = [key for key in KEYS if key in text or f" {key.rpartition('.')[2]} " in text]
    assert len(shown) >= 8  # batch, targets and accumulation have shorter names


def test_a_setting_that_no_trial_trains_with_is_left_out() -> None:
    head, _ = drawn(slot_table([slot(3, 1)], ["train.seed", "lora.r"]))

    assert head.split()[:3] == ["trial", "r", "loss"]
