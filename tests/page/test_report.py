"""The report is one file, says what the study says, and runs nothing that came from data."""

import itertools
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lora_search.files.row_scores import BASE, write_scores
from lora_search.page.report import write_report
from lora_search.page.text_report import report_markdown
from lora_search.results.findings import edges, facts, share_saved
from lora_search.results.record import StudyRecord
from lora_search.results.samples import Sample, write_samples
from lora_search.settings.composition import compose
from lora_search.settings.schema import as_dict
from lora_search.trial import RowScores, TrialRow
from tests.rows import ATTRIBUTES, BEST, HOSTILE, ROWS, make_row


class Page(HTMLParser):
    """Collects what a browser would load, run and show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.scripts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._inside: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._inside:
            self.scripts[-1] += data
            return
        self.text += data
        if {"td", "th"} & set(self._inside):
            self.tables[-1][-1][-1] += data.strip()


def report(tmp_path: Path, rows: list[TrialRow], attributes: dict[str, str] | None = None) -> Page:
    known = ATTRIBUTES if attributes is None else attributes
    path = write_report(StudyRecord(rows, known, tmp_path / "faq"))
    return Page(path.read_text(encoding="utf-8"))


def test_the_headline_compares_the_base_model_with_the_best_trial(tmp_path: Path) -> None:
    page = report(tmp_path, ROWS)

    text = " ".join(page.text.split())
    assert "14.200 → 8.500" in text
    assert "-40.1 %" in text  # 8.5 / 14.2 - 1
    assert "6 trials complete" in re.sub(r"(\d)(trials)", r"\1 \2", text)


def test_the_leaderboard_ranks_by_perplexity_after_the_base_model(tmp_path: Path) -> None:
    table = report(tmp_path, ROWS).tables[0]

    numbers = [row[0] for row in table[1:]]
    assert numbers == ["–", "5", "4", "3", "2", "1", "0", "15", *map(str, range(6, 14)), "14"]
    assert table[0][3:6] == ["r", "lr", "target_modules"]
    assert table[2][3:6] == ["32", "1.42e-3", "all-linear"]


def test_a_pruned_trial_below_the_best_is_not_called_the_best(tmp_path: Path) -> None:
    page = report(tmp_path, [*ROWS, make_row(16, "PRUNED", 8.1, 5)])

    assert "14.200 → 8.500" in " ".join(page.text.split())


def test_every_stopped_trial_is_listed_with_its_reason(tmp_path: Path) -> None:
    table = report(tmp_path, ROWS).tables[1]

    reasons = {row[0]: row[4] for row in table[1:]}
    assert len(reasons) == 9
    assert reasons["7"] == "rung 3: not among the best 7 of 9"
    assert reasons["14"] == f"diverged: {HOSTILE}"


def test_it_answers_in_the_order_in_which_it_is_asked(tmp_path: Path) -> None:
    write_samples(
        tmp_path / "faq", BEST, 96, [Sample("What is a snag list?", "A list.", "A fish.", "A list.")]
    )
    rows = [replace(row, began=1020.0, ended=1055.0) for row in ROWS]
    page = report(tmp_path, rows, {**ATTRIBUTES, "worked": "[[1000.0, 1200.0]]"})
    markdown = report_markdown(StudyRecord(ROWS, ATTRIBUTES, tmp_path / "faq"))

    html = (tmp_path / "faq" / "report.html").read_text()
    shown = re.findall("<h2>(.*?)</h2>", html)
    assert shown == [
        "Sample answers", "What it cost", "Leaderboard so far", "What mattered", "What may help further",
        "Learning curves", "When the slots were busy", "What was stopped, and why", "How to reproduce it",
    ]  # fmt: skip
    written = re.findall("^## (.*)$", markdown, re.MULTILINE)
    assert written == [
        "Sample answers", "What it cost", "Leaderboard", "What mattered", "What may help further",
        "What was stopped, and why", "Data", "How to reproduce it",
    ]  # fmt: skip
    assert "A fish." in page.text
    assert "- base model: A fish." in markdown
    assert HOSTILE not in markdown


def test_it_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    page = report(tmp_path, ROWS)

    assert page.loaded == []
    assert page.scripts == []
    assert (tmp_path / "faq" / "report.html").stat().st_size < 1_000_000


def test_hostile_text_stays_text_everywhere(tmp_path: Path) -> None:
    params: dict[str, object] = {**BEST.params, f"lora.{HOSTILE}": HOSTILE}
    rows = [replace(row, reason=HOSTILE, params=params) for row in ROWS]
    hostile = report(tmp_path, rows, {**ATTRIBUTES, "study": HOSTILE, HOSTILE: HOSTILE, "command": HOSTILE})

    path = tmp_path / "faq" / "report.html"
    assert '<script>alert("x")' not in path.read_text(encoding="utf-8")
    assert not any(script.startswith("alert") for script in hostile.scripts)
    assert hostile.text.count(HOSTILE) > len(rows)


def test_curves_start_at_the_base_model_and_run_over_epochs(tmp_path: Path) -> None:
    report(tmp_path, [make_row(0, best=8.0, rungs=8)])

    html = (tmp_path / "faq" / "report.html").read_text().partition('aria-label="Learning curves"')[2]
    (path,) = re.findall(r'<path class="line best" d="M([^"]+)"', html)
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    steps = [b[0] - a[0] for a, b in itertools.pairwise(points)]
    base = re.findall(r'<path class="line base" d="M\S+ (\S+)L', html)[0]
    assert len(points) == 9  # the base and 8 rungs, a quarter of an epoch apart
    assert steps == pytest.approx([steps[0]] * 8, abs=0.11)
    assert points[0][1] == float(base)
    assert points[-1][1] == max(y for _, y in points)  # lowest perplexity, furthest down


def test_it_says_how_sure_the_winner_is(tmp_path: Path) -> None:
    folder = tmp_path / "faq"
    hard_R, tokens_R = np.linspace(300.0, 500.0, 20), np.full(20, 100)
    wobble_R = np.where(np.arange(20) % 2 == 0, 3.0, -3.0)
    write_scores(folder, RowScores(hard_R + 50.0, tokens_R), 0, BASE)
    rows = []
    for number, excess_R in enumerate((0.0 * wobble_R, 0.5 + wobble_R, 20.0 + wobble_R)):
        scores = RowScores(hard_R + excess_R, tokens_R)
        write_scores(folder / "trials" / str(number), scores, 12)
        rows.append(make_row(number, best=scores.perplexity))

    page = report(tmp_path, rows)

    text = " ".join(page.text.split())
    assert "Trial 1 is tied with trial 0: within two standard errors on 20 validation rows" in text
    assert "Against the base model on the same 20 validation rows: -39.3" in text  # exp(-0.5) - 1
    assert "The test split has not been scored." in text
    states = {row[0]: row[-1] for row in page.tables[0][1:]}
    assert states["1"] == "complete, tied"
    assert states["2"] == "complete"


def test_a_best_value_at_the_edge_comes_with_a_wider_range_to_type(tmp_path: Path) -> None:
    given = ["study.name=faq", "lora.r=choice(8,16,32)", "optim.lr=tag(log,interval(1e-5,1e-2))"]
    recorded = {"settings": json.dumps(as_dict(compose("smoke", given)))}
    text = " ".join(report(tmp_path, ROWS, {**ATTRIBUTES, **recorded}).text.split())

    assert "lora.r=32 is the largest choice: a larger one may be better. To extend" in text
    assert "'space.lora.r=choice(8,16,32,64)'" in text
    assert "optim.lr=" not in text.partition("What may help further")[2].partition("Learning curves")[0]
    assert "The best trial was still improving at its end" in text


def test_the_override_of_a_range_under_a_mapping_is_whole(tmp_path: Path) -> None:
    typed = ["lora.rank_pattern=choice({q_proj:32},{v_proj:4})",
             "lora.r=when(lora.rank_pattern,{q_proj:32},interval(4,16),{v_proj:4},range(4,9))"]  # fmt: skip
    recorded = {"settings": json.dumps(as_dict(compose("smoke", typed)))}
    params = {"lora.rank_pattern": '{"q_proj": 32}', "lora.r": 16}

    [(text, override)] = edges(recorded, replace(make_row(0), params=params))

    assert text.endswith("To extend the range in the same study:")
    assert shlex.split(override) == [
        "space.lora.r=when(lora.rank_pattern, {q_proj:32}, interval(4,22), {v_proj:4}, interval(4,8))"
    ]


@pytest.mark.parametrize(
    "rows",
    [[], [make_row(0, "FAIL", None)], [make_row(0, "WAITING", None, 0)]],
)
def test_a_study_that_has_measured_nothing_has_a_report_too(tmp_path: Path, rows: list[TrialRow]) -> None:
    assert "nothing is measured yet" in report(tmp_path, rows).text


@pytest.mark.parametrize("state", ["RUNNING", "WAITING"])
def test_the_report_of_a_study_that_goes_on_names_the_best_so_far(tmp_path: Path, state: str) -> None:
    text = report(tmp_path, [make_row(0, state, 9.0, 1), make_row(1, "PRUNED", 8.0, 1)]).text

    assert "base model to best adapter so far" in text
    assert "Leaderboard so far" in text


def test_a_report_is_replaced_in_one_go(tmp_path: Path) -> None:
    report(tmp_path, ROWS[:1])
    report(tmp_path, ROWS)

    assert [path.name for path in (tmp_path / "faq").iterdir()] == ["report.html"]


def test_the_saving_counts_rungs_the_pruned_trials_did_not_train() -> None:
    assert share_saved(ROWS) == (8 * 3, 8 * 12)
    assert share_saved(ROWS[:6]) is None


def test_facts_are_grouped_and_the_fingerprint_is_left_out() -> None:
    grouped = facts({**ATTRIBUTES, "fingerprint": "{}"})

    assert list(grouped) == ["Run", "Data", "Versions", "Settings"]
    assert grouped["Data"] == {"duplicates": "3", "train": "402"}
    assert grouped["Versions"] == {"torch": "2.13.0"}
    assert grouped["Settings"]["lora.dropout"] == "0.05"
    assert "fingerprint" not in grouped["Run"]


def test_what_was_recovered_is_told_with_its_trial(tmp_path: Path) -> None:
    rows = [replace(ROWS[0], recovery="rung-00003.safetensors is damaged: resumed from rung 2"), *ROWS[1:]]

    write_report(StudyRecord(rows, ATTRIBUTES, tmp_path))
    write_report(StudyRecord(ROWS, ATTRIBUTES, tmp_path / "calm"))

    told = Page((tmp_path / "report.html").read_text()).text
    assert "trial 0: rung-00003.safetensors is damaged: resumed from rung 2" in told
    assert "What was recovered" not in Page((tmp_path / "calm" / "report.html").read_text()).text
