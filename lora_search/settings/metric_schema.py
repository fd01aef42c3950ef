"""The settings of the metric of generated answers: which one, on how many rows, how long answers may be."""

import re
from dataclasses import dataclass

from lora_search.settings.rules import require, require_choice, require_range

METRICS = ("none", "exact_match", "rouge_l", "chrf", "python")
PATH = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+"


@dataclass(kw_only=True)
class MetricConfig:
    """Changes no trial's numbers; with ``study.choose_by=metric`` it chooses the winner. Never prunes."""

    name: str = "none"  # of METRICS
    function: str | None = None  # python: my_module.f, called as f(prompt, answer, reference) -> float
    max_rows: int = 50  # of the validation split, the first ones
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        require_choice("metric.name", self.name, METRICS)
        require_range("metric.max_rows", self.max_rows, 1, 100_000)
        require_range("metric.max_new_tokens", self.max_new_tokens, 1, 32_768)
        is_python = self.name == "python"
        remedy = "Add metric=python, or leave metric.function out"
        require(is_python or self.function is None, "metric.function", self.function,
                "is for metric=python only", remedy)  # fmt: skip
        is_path = self.function is not None and re.fullmatch(PATH, self.function) is not None
        require(is_path or not is_python, "metric.function", self.function, "must be a dotted path",
                "Give metric.function=my_module.my_function")  # fmt: skip


def check_choice(choose_by: str, metric: MetricConfig) -> None:
    """Raise ConfigError where a metric is to choose the winner and there is none."""
    can_choose = choose_by == "perplexity" or metric.name != "none"
    require(can_choose, "study.choose_by", choose_by, "needs a metric", "Add metric=rouge_l")
