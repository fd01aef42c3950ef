import io
from pathlib import Path

from rich.console import Console

from lora_search.progress import Progress, leaderboard
from lora_search.report import write_report
from lora_search.trial import TrialRow


def row(number: int, state: str, perplexity: float | None, reason: str = "") -> TrialRow:
    curve = {} if perplexity is None else {1: perplexity + 1, 2: perplexity}
    return TrialRow(
        number=number, state=state, perplexity=perplexity, best_rung=2,
        params={"lora.r": 8, "optim.lr": 1e-3 * (number + 1)},
        perplexities=curve, reason=reason, examples_seen=10, train_tokens=1000, train_seconds=3.0,
    )  # fmt: skip


ROWS = [
    row(0, "PRUNED", 9.0, "<script>alert(1)</script>"),
    row(1, "COMPLETE", 8.0),
    row(2, "FAIL", None, "diverged"),
]


def test_the_report_ranks_trials_and_keeps_hostile_text_as_text(tmp_path: Path) -> None:
    write_report(ROWS, {"base_perplexity": "12.0"}, 12.0, tmp_path / "s" / "report.html")

    html = (tmp_path / "s" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in html
    assert "<script>alert(1)" not in html
    assert html.index("8.000") < html.index("9.000") < html.index("diverged")
    assert "33.3" in html


def test_the_leaderboard_starts_with_the_base_model() -> None:
    console = Console(width=120, record=True, file=io.StringIO())

    console.print(leaderboard(ROWS, 12.0))

    text = console.export_text()
    assert text.index("12.0") < text.index("8.0") < text.index("9.0")
    assert text.index("base") < text.index("8.0")


def test_a_plain_terminal_gets_plain_lines(capsys) -> None:  # type: ignore[no-untyped-def]
    with Progress() as progress:
        progress.event("trial [3] pruned")

    assert capsys.readouterr().out.endswith("trial [3] pruned\n")
