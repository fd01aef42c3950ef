"""`metric=...`: the generated answers of base and survivors, scored, kept, shown, and choosing the winner."""

import html
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from lora_search import report, status, sweep
from lora_search.errors import ConfigError, StudyError
from lora_search.results.ranking import best_of, ranked
from lora_search.results.verdict import metric_line
from lora_search.service.answer_metrics import Answer, check_metric, score_answers
from lora_search.service.answering import _together, paired
from lora_search.settings.composition import compose
from lora_search.settings.metric_schema import MetricConfig
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.study.answer_metric import read_standing
from lora_search.study.fingerprint import settings_part
from lora_search.study.study import SweepStudy
from lora_search.trial import AnswerScore, TrialRow
from tests.commands import SMOKE
from tests.test_answer import plain_answer, plain_base

STUDY = StudyConfig(name="smoke")
PROMPT, REFERENCE = "user\nWho pays?", "The owner of the house pays the fee."


def scores(name: str, *answers: str, function: str | None = None) -> list[float]:
    config = MetricConfig(name=name, function=function)
    return score_answers(config, [Answer(PROMPT, REFERENCE, answer) for answer in answers])


def test_each_metric_gives_what_is_known_of_its_formula() -> None:
    same = "the owner of the  house pays the fee."
    assert scores("exact_match", same, "The owner") == [100.0, 0.0]
    # of 4 words, 3 in order ("the owner pays") among the reference's 8: P 3/4, R 3/8, F 1/2
    assert scores("rouge_l", REFERENCE, "The owner always pays") == pytest.approx([100.0, 50.0])
    assert scores("chrf", REFERENCE, "zzz") == pytest.approx([100.0, 0.0], abs=1e-6)


def test_rouge_counts_words_of_any_language() -> None:
    config = MetricConfig(name="rouge_l")
    answers = [Answer("", "Ägaren betalar avgiften", "ägaren betalar"), Answer("", "你好 世界", "世界")]

    assert score_answers(config, answers) == pytest.approx([80.0, 200 / 3])


def test_a_python_function_is_found_beside_the_command_and_called_for_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_metric_a.py").write_text(
        "def f(prompt, answer, reference):\n    return len(answer) + (prompt != reference)\n"
    )

    assert scores("python", "abc", "", function="my_metric_a.f") == [4.0, 1.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    raise KeyError('no')", "my_metric_b.f failed on validation row 1: KeyError: 'no'"),
        ("    return float('nan')", "my_metric_b.f gave nan for validation row 1: not a number"),
        ("    return 'good'", "failed on validation row 1: ValueError"),
    ],
)
def test_a_python_function_that_fails_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_metric_b", raising=False)
    (tmp_path / "my_metric_b.py").write_text(f"def f(prompt, answer, reference):\n{body}\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    with pytest.raises(StudyError) as raised:
        scores("python", "abc", function="my_metric_b.f")

    assert message in str(raised.value)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["metric.name=bleu"], "metric.name: must be one of none, exact_match, rouge_l, chrf, python"),
        (["metric=bleu"], "metric"),
        (["metric.max_rows=0"], "metric.max_rows: must be at least 1"),
        (["metric.max_new_tokens=100000"], "metric.max_new_tokens: must be at most 32,768"),
        (["metric.function=a.b"], "metric.function: is for metric=python only"),
        (["metric=python"], "metric.function: must be a dotted path"),
        (["metric=python", "metric.function=f"], "metric.function: must be a dotted path"),
        (["study.choose_by=bleu", "metric=chrf"], "study.choose_by: must be one of perplexity, metric"),
        (["study.choose_by=metric"], "study.choose_by: needs a metric, got 'metric'. Add metric=rouge_l"),
    ],
)
def test_wrong_metrics_are_one_message(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011 (InputError, or one of its kind)
        compose("smoke", overrides)

    assert message in str(raised.value)
    assert getattr(raised.value, "exit_code", None) == 2


@pytest.mark.wrong_input
@pytest.mark.parametrize("function", ["no_such_module_here.f", "json.no_such_function", "json.__doc__"])
def test_a_function_that_is_not_there_is_found_out_before_a_model_is_loaded(function: str) -> None:
    with pytest.raises(ConfigError, match="metric.function: must be a function"):
        check_metric(MetricConfig(name="python", function=function))


def test_a_metric_is_free_to_change_under_one_study_name() -> None:
    plain, scored = SweepConfig(), SweepConfig(metric=MetricConfig(name="chrf"))
    scored.study.choose_by = "metric"

    assert settings_part(plain) == settings_part(scored)


def row(number: int, perplexity: float, score: float | None, state: str = "COMPLETE") -> TrialRow:
    metric = score if score is None else AnswerScore(
        name="chrf", score=score, base=10.0, num_rows=8, behind=None, chooses=True
    )  # fmt: skip
    return TrialRow(
        number=number, state=state, perplexity=perplexity, best_rung=4, params={},
        perplexities={4: perplexity}, reason="", examples_seen=1, train_tokens=1, train_seconds=1.0,
        metric=metric,
    )  # fmt: skip


def test_a_metric_chooses_among_the_complete_trials_and_perplexity_among_equals() -> None:
    rows = [
        row(0, 30.0, 20.0),
        row(1, 31.0, 25.0),
        row(2, 29.0, None),
        row(3, 30.5, 25.0),
        row(4, 28.0, 99.0, "PRUNED"),
    ]

    best = best_of(rows)

    assert best is rows[3]
    assert [one.number for one in ranked(rows)] == [3, 1, 0, 4, 2]
    assert best_of([one for one in rows if one.metric is None]) is rows[2]


def test_a_paired_difference_has_the_standard_error_of_the_mean() -> None:
    assert paired([1.0, 2.0, 6.0], [0.0, 2.0, 3.0]) == pytest.approx(
        (4 / 3, np.std([1, 0, 3], ddof=1) / 3**0.5)
    )


def test_answers_of_base_and_trials_are_scored_once_kept_and_shown(
    typed: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my_metric_c.py").write_text("def length(prompt, answer, reference):\n    return len(answer)\n")
    metric = [
        "metric=python",
        "metric.function=my_metric_c.length",
        "metric.max_rows=3",
        "metric.max_new_tokens=6",
    ]
    before = best_of(SweepStudy.read(STUDY)[0])
    command = ["sweep", *SMOKE, *metric, "study.choose_by=metric"]
    monkeypatch.setattr(sys, "argv", command)
    assert sweep.main() == 0

    out, (rows, attributes) = " ".join(capsys.readouterr().out.split()), SweepStudy.read(STUDY)
    best, standing = best_of(rows), read_standing(attributes)
    assert best is not None
    assert standing is not None
    for one in rows:
        lines = [
            json.loads(line)
            for line in Path(f"runs/smoke/trials/{one.number}/answers.jsonl").read_text().splitlines()
        ]
        adapted = PeftModel.from_pretrained(plain_base(), f"runs/smoke/trials/{one.number}/adapter")
        questions = [line["prompt"].removeprefix("user\n").removesuffix("\nassistant") for line in lines]
        assert [line["answer"] for line in lines] == [
            plain_answer(adapted, question, 6) for question in questions
        ]
        assert one.metric is not None
        assert one.metric.score == pytest.approx(np.mean([len(line["answer"]) for line in lines]))
        assert len(lines) == one.metric.num_rows == 3
    assert best.metric is not None
    assert best.metric.score == max(one.metric.score for one in rows if one.metric is not None)
    assert metric_line(rows) in out
    assert typed(status.main) == 0
    assert metric_line(rows) in " ".join(capsys.readouterr().out.split())
    assert typed(report.main) == 0
    assert html.escape(metric_line(rows)) in Path("runs/smoke/report.html").read_text()

    written = Path("runs/smoke/trials/0/answers.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", command)
    assert sweep.main() == 0
    assert Path("runs/smoke/trials/0/answers.jsonl").stat().st_mtime_ns == written

    monkeypatch.setattr(sys, "argv", ["sweep", *SMOKE])
    assert sweep.main() == 0
    after = best_of(SweepStudy.read(STUDY)[0])
    assert before is not None
    assert after is not None
    assert after.number == before.number  # by perplexity again


def test_trials_whose_answers_are_on_another_disk_answer_again_beside_new_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sweep", *SMOKE, "metric=rouge_l", "metric.max_rows=3", "metric.max_new_tokens=6"]
    monkeypatch.setattr(sys, "argv", [*command, "study.n_trials=2"])
    assert sweep.main() == 0
    answers = Path("runs/smoke/trials/0/answers.jsonl")
    before = answers.read_text()
    answers.unlink()

    monkeypatch.setattr(sys, "argv", [*command, "study.n_trials=3"])
    assert sweep.main() == 0

    complete = [row for row in SweepStudy.read(STUDY)[0] if row.state == "COMPLETE"]
    assert answers.read_text() == before
    assert len(complete) == 3
    assert all(row.metric is not None for row in complete)


@pytest.mark.parametrize(("most", "parts"), [(None, [3, 1]), (25, [2, 2]), (5, [1, 1, 1, 1])])
def test_adapters_that_answer_together_fit_into_slots_and_memory(most: int | None, parts: list[int]) -> None:
    engine: Any = SimpleNamespace(
        slots=range(3), queue=SimpleNamespace(most_bytes=most), resolve_targets=lambda targets: targets,
        bank=SimpleNamespace(bytes_of=lambda settings, names: settings.num_bytes),
    )  # fmt: skip
    view: Any = SimpleNamespace(settings_of=lambda number: SimpleNamespace(target_modules=(), num_bytes=10))
    rows: Any = [SimpleNamespace(number=number) for number in range(4)]

    assert [len(part) for part in _together(engine, view, rows)] == parts
