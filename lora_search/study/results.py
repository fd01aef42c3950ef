"""Results found after the search and stored with the study: test score, confirmation, final adapter.

Each is JSON in one attribute of the study. Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import optuna

from lora_search.database.storage import explained_errors, open_storage
from lora_search.settings.schema import StudyConfig

TEST_SCORE = "test_score"


@dataclass(frozen=True, kw_only=True)
class TestScore:
    """How winner and base did on the test split, at the first look or the latest."""

    __test__ = False  # pytest takes the name for one of its own

    trial: int
    rung: int
    perplexity: float
    base_perplexity: float
    difference: float  # of the mean NLL, against the base, with its standard error
    error: float
    num_rows: int
    scored_at: str  # ISO 8601, UTC
    looks: int  # how often the split has been looked at
    earlier: tuple[tuple[int, float, str], ...] = ()  # (trial, perplexity, when) of the looks before


def read_test_score(attributes: Mapping[str, str]) -> TestScore | None:
    """Return the score that the study holds, if any."""
    if TEST_SCORE not in attributes:
        return None
    stored = json.loads(attributes[TEST_SCORE])
    return TestScore(**{**stored, "earlier": tuple(tuple(look) for look in stored["earlier"])})


def store_test_score(config: StudyConfig, score: TestScore) -> None:
    """Put the score into the study, in the place of an older one."""
    store_result(config, TEST_SCORE, asdict(score))


def store_result(config: StudyConfig, key: str, value: Mapping[str, object]) -> None:
    """Put a result into the study, in the place of an older one."""
    with explained_errors(config):
        study = optuna.load_study(study_name=config.name, storage=open_storage(config))
        study.set_user_attr(key, json.dumps(value))
