"""What is on the screen, with and without a terminal. Time is a clock that the tests turn."""

import io
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from lora_search.output.terminal import Progress, TimeLeft, next_steps
from lora_search.results.formatting import show_change, show_count, show_perplexity, show_seconds, show_value
from lora_search.results.ranking import best_of
from lora_search.settings.schema import DataConfig, StudyConfig, SweepConfig, TrackerConfig
from lora_search.trial import SlotView, StudySummary, TrialSettings
from tests.rows import BEST, ROWS, make_row

SETTINGS = TrialSettings(
    r=8, alpha=16.0, dropout=0.05, target_modules=("q_proj", "v_proj"), use_rslora=False,
    lr=2.13e-4, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, max_grad_norm=1.0, schedule="cosine",
    warmup_ratio=0.05, batch_size=16, gradient_accumulation_steps=4, epochs=3, evals_per_epoch=4,
    early_stopping_patience=None,
)  # fmt: skip
SUMMARY = StudySummary(
    finished=5, n_trials=12, complete=2, pruned=3, failed=0, running=2, best_number=1, best_perplexity=8.123
)


class Clock:
    """A clock that stands until it is turned."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def slot(number: int, rung: int, part: float = 0.0) -> SlotView:
    """Return a trial that has trained so many rungs of 100 examples."""
    examples = round(100 * (rung + part))
    return SlotView(
        trial_number=number, settings=SETTINGS, rung=rung, examples_seen=examples,
        next_rung_examples=100 * (rung + 1), loss=2.25 if rung else None, perplexity=9.5 if rung else None,
    )  # fmt: skip


def terminal(width: int, is_terminal: bool = True) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        height=40,
        force_terminal=is_terminal,
        color_system=None,
        highlight=False,
    )


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def without_codes(text: str) -> str:
    """Return the text without what moves the cursor."""
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text)


def drawn(renderable: RenderableType, width: int = 80) -> list[str]:
    """Return the lines as they stand in a terminal of that width."""
    console = terminal(width)
    console.print(renderable)
    return [line.rstrip() for line in printed(console).splitlines()]


def test_without_a_terminal_the_state_comes_as_one_plain_line() -> None:
    console = terminal(80, is_terminal=False)

    with Progress(console, Clock()) as progress:
        progress.update([slot(3, 1, 0.5), slot(4, 0)], SUMMARY, 412.3)

    assert printed(console) == (
        "[ 0:00] 5/12 trials, 3 pruned, best 8.123 (trial 1), 412 tokens/s"
        " | trial 3 rung 1/12 9.500 | trial 4 rung 0/12 -\n"
    )


def test_plain_status_lines_come_every_half_minute_however_often_they_are_offered() -> None:
    console, clock = terminal(80, is_terminal=False), Clock()

    with Progress(console, clock) as progress:
        for _ in range(610):
            progress.update([slot(3, 1)], SUMMARY, 412.3)
            clock.now += 0.1

    assert [line[:7] for line in printed(console).splitlines()] == ["[ 0:00]", "[ 0:30]", "[ 1:00]"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_view_shows_every_slot_in_full(width: int) -> None:
    console = terminal(width)

    with Progress(console, Clock()) as progress:
        progress.update([slot(3, 1, 0.5), slot(11, 0)], SUMMARY, 1412.3)

    lines = [" ".join(line.split()) for line in printed(console).splitlines()]
    assert any(line.startswith("3 8 16 2.13e-4 16x4 q,v 2.250 9.500 1/12 ━") for line in lines)
    assert any(line.startswith("11 8 16 2.13e-4 16x4 q,v - - 0/12") for line in lines)
    assert any("best perplexity 8.123 (trial 1)" in line for line in lines)
    assert any("5/12 trials 3 pruned 1,412 tokens/s" in line for line in lines)
    assert max(map(len, without_codes(printed(console)).splitlines())) <= width


def test_the_live_view_is_drawn_at_most_twice_a_second() -> None:
    console, clock = terminal(80), Clock()

    with Progress(console, clock) as progress:
        for _ in range(5):
            progress.update([slot(3, 1)], SUMMARY, 412.3)
            clock.now += 0.25
        drawings = printed(console).count("best perplexity")

    assert drawings == 3


def test_events_stay_as_they_were_written() -> None:
    console = terminal(80, is_terminal=False)

    with Progress(console, Clock()) as progress:
        progress.event(
            "trial 3 [bold]pruned[/bold] at rung 2: perplexity 9.31, best third is <= 8.80, " + "x" * 60
        )

    assert printed(console).splitlines() == [
        "[ 0:00] trial 3 [bold]pruned[/bold] at rung 2: perplexity 9.31, best third is <= 8.80, " + "x" * 60
    ]


def test_warnings_of_the_program_go_through_the_view_and_only_while_it_is_open() -> None:
    console = terminal(80, is_terminal=False)
    logger = logging.getLogger("lora_search.tracking")

    with Progress(console, Clock()):
        logger.warning("W&B failed %d times", 3)

    assert printed(console) == "[ 0:00] warning: W&B failed 3 times\n"
    assert logging.getLogger("lora_search").handlers == []
    assert logging.getLogger("lora_search").propagate


def test_the_time_left_is_the_rungs_left_at_the_speed_so_far() -> None:
    summary = replace(SUMMARY, finished=0, n_trials=3, running=1)
    time_left = TimeLeft()

    assert time_left.estimate(0.0, [slot(0, 0)], summary) is None
    # 2 of 12 rungs took 20 s; 10 and two whole trials of 12 are left.
    assert time_left.estimate(20.0, [slot(0, 2)], summary) == pytest.approx((10 + 24) * 10)


def test_trials_pruned_early_shorten_the_time_left() -> None:
    summary = replace(SUMMARY, finished=1, n_trials=3, running=1)
    time_left = TimeLeft()
    time_left.estimate(0.0, [slot(0, 0)], summary)
    time_left.estimate(30.0, [slot(0, 3)], summary)

    # Trial 0 was pruned after 3 rungs: trial 1 has 2 of as many left, trial 2 all 3.
    assert time_left.estimate(40.0, [slot(1, 1)], summary) == pytest.approx((2 + 3) * 40 / 3)


def test_rungs_trained_before_a_restart_do_not_count_as_speed() -> None:
    summary = replace(SUMMARY, finished=0, n_trials=1, running=1)
    time_left = TimeLeft()
    time_left.estimate(0.0, [slot(0, 6)], summary)

    assert time_left.estimate(20.0, [slot(0, 8)], summary) == pytest.approx(4 * 10)


def test_other_workers_share_the_time_left() -> None:
    alone = replace(SUMMARY, finished=0, n_trials=4, running=1)
    helped = replace(alone, running=2)
    first, second = TimeLeft(), TimeLeft()
    first.estimate(0.0, [slot(0, 0)], alone)
    second.estimate(0.0, [slot(0, 0)], helped)

    ours, shared = first.estimate(20.0, [slot(0, 2)], alone), second.estimate(20.0, [slot(0, 2)], helped)

    assert ours is not None
    assert shared is not None
    assert shared < ours


def test_next_steps_are_commands_that_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # as after `make sweep`: the environment is not activated
    monkeypatch.delenv("MAKELEVEL", raising=False)
    config = SweepConfig(
        study=StudyConfig(name="faq", n_trials=5, storage="postgresql://u:secret@db/my faq"),
        data=DataConfig(path="my.jsonl"),
    )

    steps = next_steps(config, Path("runs/faq"), "runs/faq/best/adapter").splitlines()

    bin_folder = Path(sys.executable).parent
    assert steps[0] == "  report         runs/faq/report.html"
    assert steps[2].endswith(
        "/optuna-dashboard --artifact-dir runs/.dashboard 'postgresql://u:***@db/my faq'"
    )
    assert Path(steps[2].split()[1]).resolve() == bin_folder.resolve() / "optuna-dashboard"
    assert steps[3].endswith("/wandb sync runs/faq/wandb/offline-run-* runs/faq/trials/*/wandb/offline-run-*")
    assert steps[4].endswith("the same command with study.n_trials=10")
    assert "python -m lora_search.sweep data=jsonl" in steps[5]


def test_next_steps_after_make_are_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKELEVEL", "1")
    config = SweepConfig(data=DataConfig(path="my.jsonl"), tracker=TrackerConfig(name="none"))

    steps = next_steps(config, Path("runs/faq"), "none yet")

    assert "make sweep ARGS='data=jsonl data.path=my.jsonl study.name=mine'" in steps
    assert "W&B" not in steps


def test_the_best_has_the_lowest_perplexity_of_those_complete_or_still_at_it_else_of_the_pruned() -> None:
    assert best_of([*ROWS, make_row(16, "PRUNED", 5.0), make_row(17, best=float("nan"))]) is BEST
    assert best_of([*ROWS, waiting := make_row(16, "WAITING", 5.0, 3)]) is waiting
    assert best_of([*ROWS, paused := replace(make_row(16, "PRUNED", 5.0), is_paused=True)]) is paused
    assert best_of([make_row(0, "PRUNED", 6.0), pruned := make_row(1, "PRUNED", 5.0)]) is pruned
    assert best_of([make_row(0, "FAIL", 5.0), make_row(1, "WAITING", None, 0)]) is None


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (show_perplexity(8.12345), "8.123"),
        (show_perplexity(412.66), "412.7"),
        (show_perplexity(1.3e6), "1.30e+06"),
        (show_perplexity(float("nan")), "nan"),
        (show_perplexity(None), "-"),
        (show_change(10.0, 8.0), "-20.0 %"),
        (show_change(10.0, 12.5), "+25.0 %"),
        (show_change(10.0, None), "-"),
        (show_value(2e-4), "2e-4"),
        (show_value(1.4198e-3), "1.42e-3"),
        (show_value(0.05), "0.05"),
        (show_value(16), "16"),
        (show_value('["q_proj", "v_proj"]'), "q,v"),
        (show_value(("all-linear",)), "all-linear"),
        (show_value(True), "true"),
        (show_value(None), "null"),
        (show_seconds(7), "0:07"),
        (show_seconds(192), "3:12"),
        (show_seconds(3792), "1:03:12"),
        (show_count(950), "950"),
        (show_count(12_345), "12.3 k"),
        (show_count(4_560_000), "4.56 M"),
    ],
)
def test_values_are_written_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def watched(is_terminal: bool, seconds_each: float, total: int | None = 640) -> str:
    console, clock = terminal(80, is_terminal), Clock()
    for _ in Progress(console, clock).watch(range(640), "reading rows", total):
        clock.now += seconds_each
    return printed(console)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_loop_of_under_two_seconds_shows_nothing(is_terminal: bool) -> None:
    assert watched(is_terminal, 1.9 / 640) == ""


def test_a_long_loop_draws_a_bar_in_a_terminal_and_takes_it_away() -> None:
    text = watched(True, 0.1)

    assert re.search(r"reading rows: 320 of 640, about 0:3\d left +━+", without_codes(text))
    assert text.rstrip().endswith("\x1b[2K")  # the line is wiped


@pytest.mark.parametrize(("total", "said"), [(640, "64 of 640, about 0:57 left"), (None, "64")])
def test_a_long_loop_is_a_plain_line_now_and_then_where_there_is_no_terminal(
    total: int | None, said: str
) -> None:
    text = watched(False, 0.1, total)

    assert text.splitlines()[0] == f"[ 0:06] reading rows: {said}"
    assert len(text.splitlines()) == 2
    assert "\x1b" not in text
