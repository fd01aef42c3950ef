"""The leaderboard fits a terminal, breaks no word, and says who is tied."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.console import Console

from lora_search.output.leaderboard import leaderboard
from lora_search.results.certainty import Certainty, Comparison
from lora_search.results.record import StudyRecord
from lora_search.results.verdict import split_keys
from lora_search.trial import TrialRow
from tests.rows import ATTRIBUTES, BEST, ROWS, make_row

UNKNOWN = Certainty()


@dataclass(frozen=True)
class Told(StudyRecord):
    """A record whose certainty is given, not read from the row scores."""

    certainty: Certainty = UNKNOWN


KEYS = [
    "lora.r", "lora.alpha", "lora.dropout", "lora.target_modules", "lora.use_rslora", "optim.lr",
    "optim.weight_decay", "optim.warmup_ratio", "optim.schedule", "train.batch_size",
    "train.gradient_accumulation_steps",
]  # fmt: skip


def drawn(
    rows: list[TrialRow], certainty: Certainty = UNKNOWN, width: int = 80, limit: int = 20
) -> list[str]:
    """Return the lines as a terminal of that width shows them."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(leaderboard(Told(rows, ATTRIBUTES, Path("faq"), certainty), width, limit))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_it_starts_with_the_base_model_and_fits_a_terminal() -> None:
    lines = drawn(ROWS)

    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines[1:4]] == [
        ["trial", "perplexity", "change", "r", "lr", "target_modules", "rungs", "state"],
        ["-", "14.200", "base", "model"],
        ["5", "8.500", "-40.1", "%", "32", "1.42e-3", "all-linear", "12", "complete"],
    ]


def test_it_says_how_many_it_leaves_out() -> None:
    lines = drawn(ROWS, limit=3)

    assert len(lines) == 7  # title, head, base, three trials, the rest
    assert lines[-1] == "13 more trials in the report"


def test_hostile_values_are_shown_as_they_are() -> None:
    row = replace(BEST, params={"lora.target_modules": "[red]a[/red]"})

    assert "[red]a[/red]" in "\n".join(drawn([row]))


@pytest.mark.parametrize("width", [80, 100])
def test_eleven_searched_keys_are_read_in_full(width: int) -> None:
    layers = '["q_proj", "v_proj", "up_proj"]'
    values = [[8 << i % 3, 2.5 * i, 0.1 * i, layers if i % 2 else "all-linear",
               i % 2 == 0, 1e-4 * 1.3**i, 0.01 * i, 0.02 * i, "cosine" if i % 2 else "linear",
               4 << i % 2, 1 + i]
              for i in range(8)]  # fmt: skip
    rows = [
        replace(make_row(i, best=8.0 + i), params=dict(zip(KEYS, values[i], strict=True))) for i in range(8)
    ]

    lines = drawn(rows, width=width)

    assert max(map(len, lines)) <= width
    words = [line.split() for line in lines]
    assert [line[0] for line in words if line and line[0] in KEYS] == KEYS
    rates = next(line for line in words if line[:1] == ["optim.lr"])
    assert rates[1:4] == ["1e-4", "1.3e-4", "1.69e-4"]
    assert ["0", "8.000", "-43.7", "%", "12", "complete"] in words
    assert not any("…" in line for line in lines)


def test_what_all_trials_share_is_said_once() -> None:
    rows = [replace(row, params={**row.params, "lora.dropout": 0.05}) for row in ROWS]

    lines = drawn(rows)

    assert "dropout" not in lines[1]
    assert "the same in all trials: lora.dropout 0.05" in lines


def test_a_setting_that_only_some_trials_have_is_not_said_to_be_that_of_all() -> None:
    some = [replace(row, params={**row.params, "optim.decay_ratio": 0.1}) for row in ROWS[:3]]

    lines = drawn([*some, *ROWS[3:]], width=140)

    assert "decay_ratio" in lines[1]
    assert not any("the same in all trials" in line and "decay_ratio" in line for line in lines)


def test_a_trial_that_waits_without_settings_hides_nothing_that_the_others_share() -> None:
    rows = [replace(row, params={**row.params, "lora.dropout": 0.05}) for row in ROWS]

    assert split_keys([*rows, replace(make_row(99, "WAITING", None, 0), params={})])[1] == split_keys(rows)[1]


def test_tied_trials_are_named_with_the_rows_that_would_separate_them() -> None:
    certainty = Certainty(
        against_best={4: Comparison(0.0117, 0.0090, 20), 3: Comparison(0.0233, 0.0080, 20)},
        against_base={5: Comparison(-0.513, 0.03, 20)},
    )

    lines = drawn(ROWS[:6], certainty, width=100)

    four, three = (next(line for line in lines if line.split()[:1] == [number]) for number in "43")
    assert "complete, tied" in four
    assert "+1.2 ± 0.9 %" in four
    assert "tied" not in three
    assert next(line.split() for line in lines if line.split()[:1] == ["5"])[1:4] == ["8.50", "-40", "%"]
    text = " ".join(" ".join(lines).split())
    needed = Comparison(0.0117, 0.0090, 20).rows_needed
    assert needed == 48  # 20 * (2 * 0.0090 / 0.0117)^2 = 47.3
    assert (
        f"trial 4 is tied with trial 5: within two standard errors on 20 validation rows; about {needed}"
        in text
    )
