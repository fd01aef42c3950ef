"""How good an answer is against its reference: a score a row, the higher the better. No torch."""

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_search.errors import ConfigError, MetricError
from lora_search.settings.metric_schema import MetricConfig

NEEDS = {"rouge_l": "rouge_score", "chrf": "sacrebleu"}
Score = Callable[[str, str, str], float]


@dataclass(frozen=True)
class Answer:
    """One generated answer. ``prompt``: as the model reads it, without control tokens."""

    prompt: str
    reference: str
    answer: str


def check_metric(config: MetricConfig) -> None:
    """Raise ConfigError where the metric's package is missing, or its function cannot be found."""
    package = NEEDS.get(config.name)
    if package is not None and importlib.util.find_spec(package) is None:
        remedy = "Run: pip install 'lora-search[metrics]'"
        raise ConfigError("metric", config.name, f"needs the package {package}", remedy)
    if config.name == "python":
        load_function(config)


def load_function(config: MetricConfig) -> Score:
    """Return the function that metric.function names; modules of this folder are found."""
    assert config.function is not None
    module_name, _, name = config.function.rpartition(".")
    if "" not in sys.path:
        sys.path.append("")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # noqa: BLE001 (it is the user's code that is imported)
        rule = f"must be a function that can be imported ({type(error).__name__}: {error})"
        raise ConfigError(
            "metric.function", config.function, rule, "Start in the folder of its module."
        ) from None
    if not callable(found):
        raise ConfigError("metric.function", config.function, "must be a function")
    return found  # type: ignore[no-any-return]


def score_answers(
    config: MetricConfig, answers: Sequence[Answer], after_each: Callable[[], None] = lambda: None
) -> list[float]:
    """Return a score for each answer; call ``after_each`` after each. Raises MetricError where the user's
    function fails."""
    score, found = scorer(config), []
    for number, answer in enumerate(answers, start=1):
        found.append(_checked(config, score, answer, number))
        after_each()
    return found


def _checked(config: MetricConfig, score: Score, answer: Answer, number: int) -> float:
    try:
        value = float(score(answer.prompt, answer.answer, answer.reference))
    except Exception as error:  # noqa: BLE001 (a user's function may raise anything)
        text = f"{type(error).__name__}: {error}"
        raise MetricError(f"metric: {named(config)} failed on validation row {number}: {text}.") from None
    if not math.isfinite(value):
        raise MetricError(f"metric: {named(config)} gave {value} for validation row {number}: not a number.")
    return value


def named(config: MetricConfig) -> str:
    """Return what people call the metric: its name, or its function."""
    return config.function or config.name


def scorer(config: MetricConfig) -> Score:
    """Return the function that scores one answer."""
    if config.name == "python":
        return load_function(config)
    return rouge_l() if config.name == "rouge_l" else {"exact_match": exact_match, "chrf": chrf}[config.name]


def exact_match(_: str, answer: str, reference: str) -> float:
    """Return 100 where both are the same words, whatever their case and spacing."""
    return 100.0 * (answer.casefold().split() == reference.casefold().split())


def rouge_l() -> Score:
    """Return ROUGE-L's F measure in percent (Lin 2004), over words of any language."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rougeL"], tokenizer=Words())
    return lambda _, answer, reference: 100.0 * scores.score(reference, answer)["rougeL"].fmeasure


class Words:
    """Splits text into words. The package's own tokenizer drops every letter that is not ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())


def chrf(_: str, answer: str, reference: str) -> float:
    """Return chrF in percent (Popovic 2015)."""
    from sacrebleu import sentence_chrf

    return float(sentence_chrf(answer, [reference]).score)
