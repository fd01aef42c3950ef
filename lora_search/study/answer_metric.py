"""The metric of the generated answers, as a study keeps it: each trial's with the trial, the base's with it.

A score counts only where it was made with the settings that the study has now. Knows no torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from lora_search.database.storage import explained_errors, open_storage
from lora_search.database.trial_table import TrialTable
from lora_search.settings.metric_schema import MetricConfig
from lora_search.settings.recorded import recorded_values
from lora_search.settings.schema import StudyConfig
from lora_search.study.provenance import attributes_of
from lora_search.study.stored_results import store_result
from lora_search.trial import AnswerScore, TrialRow

ATTRIBUTE = "metric"  # of the study and of its trials


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What scores must share to be compared."""

    name: str  # the metric's, or its function's
    max_rows: int
    max_new_tokens: int

    @classmethod
    def of(cls, config: MetricConfig) -> "Setup":
        name = config.function or config.name
        return cls(name=name, max_rows=config.max_rows, max_new_tokens=config.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the study itself keeps: the base's score, and how far the others are behind the best, each with
    the paired standard error over rows."""

    setup: Setup
    num_rows: int
    base: float
    behind: Mapping[int, tuple[float, float]]


def read_standing(attributes: Mapping[str, Any]) -> Standing | None:
    """Return what the study keeps; None where answers were never scored."""
    try:
        stored = json.loads(attributes[ATTRIBUTE])
        behind = {int(number): (pair[0], pair[1]) for number, pair in stored["behind"].items()}
        return Standing(**{**stored, "setup": Setup(**stored["setup"]), "behind": behind})
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):  # none, or another program's
        return None


def store_standing(config: StudyConfig, standing: Standing) -> None:
    store_result(config, ATTRIBUTE, asdict(standing))


def store_score(config: StudyConfig, number: int, setup: Setup, score: float, rung: int) -> None:
    """Keep a score with its trial, whether that has ended or not."""
    with explained_errors(config):
        table = TrialTable(open_storage(config), config.name)
        with table.locked(number) as trial:
            trial.annotate(ATTRIBUTE, {**asdict(setup), "rung": rung, "score": score})


def with_metric(
    rows: Sequence[TrialRow], trials: Sequence[FrozenTrial], study: optuna.Study
) -> list[TrialRow]:
    """Return the rows with their scores, where answers were scored as the study's settings say now."""
    attributes = attributes_of(study)
    standing = read_standing(attributes)
    if standing is None:
        return list(rows)
    chooses = recorded_values(attributes).get("study.choose_by") == "metric"
    by_number = {trial.number: trial for trial in trials}
    return [replace(row, metric=_score(by_number[row.number], row, standing, chooses)) for row in rows]


def _score(trial: FrozenTrial, row: TrialRow, standing: Standing, chooses: bool) -> AnswerScore | None:
    stored = trial.user_attrs.get(ATTRIBUTE)
    if not isinstance(stored, dict) or stored.get("rung") != row.best_rung:
        return None
    is_same = all(stored.get(key) == value for key, value in asdict(standing.setup).items())
    score = stored.get("score")
    if not is_same or not isinstance(score, int | float) or not math.isfinite(score):
        return None
    return AnswerScore(
        name=standing.setup.name,
        score=float(score),
        base=standing.base,
        num_rows=standing.num_rows,
        behind=standing.behind.get(row.number),
        chooses=chooses,
    )
