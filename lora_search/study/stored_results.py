"""Results found after the search and stored with the study: test score, confirmation, final adapter.

Each is JSON in one attribute of the study. Imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import optuna

from lora_search.database.storage import explained_errors, open_storage
from lora_search.database.write_once import read_attribute, write_once
from lora_search.settings.schema import StudyConfig

TEST_SCORE, FINALS = "test_score", "final_adapters"


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


@dataclass(frozen=True, kw_only=True)
class FinalAdapter:
    """A trial's settings, trained once more on the rows that score trials: it has no score of its own."""

    trial: int
    rung: int  # of the trial's schedule, where it ended: the trial's best
    splits: tuple[str, ...]  # what it was trained on
    num_rows: int
    epochs: float
    seed: int  # 1 is the trial's own
    folder: str  # where it was exported to
    made_at: str  # ISO 8601, UTC


def read_finals(attributes: Mapping[str, str]) -> tuple[FinalAdapter, ...]:
    """Return the final adapters made of the study, the oldest first."""
    stored = json.loads(attributes.get(FINALS, "{}")).get("adapters", ())
    return tuple(FinalAdapter(**{**one, "splits": tuple(one["splits"])}) for one in stored)


def add_final(config: StudyConfig, finals: Sequence[FinalAdapter], final: FinalAdapter) -> None:
    """Note one more final adapter, in the place of an older one in the same folder."""
    others = [one for one in finals if one.folder != final.folder]
    store_result(config, FINALS, {"adapters": [asdict(one) for one in [*others, final]]})


def read_test_score(attributes: Mapping[str, str]) -> TestScore | None:
    """Return the score that the study holds, if any."""
    if TEST_SCORE not in attributes:
        return None
    stored = json.loads(attributes[TEST_SCORE])
    return TestScore(**{**stored, "earlier": tuple(tuple(look) for look in stored["earlier"])})


def store_test_score(config: StudyConfig, score: TestScore) -> bool:
    """Put the score into the study: of several first looks only the first, a later look in the place of an
    older one. Return whether it is there now."""
    if score.looks > 1:
        store_result(config, TEST_SCORE, asdict(score))
        return True
    text = json.dumps(asdict(score))
    storage = open_storage(config)
    with explained_errors(config):
        study_id = storage.get_study_id_from_name(config.name)
        return bool(write_once(storage, study_id, {TEST_SCORE: text})[TEST_SCORE] == text)


def has_test_score(config: StudyConfig) -> bool:
    """Whether any worker has stored a score by now, in one query."""
    storage = open_storage(config)
    with explained_errors(config):
        study_id = storage.get_study_id_from_name(config.name)
        return read_attribute(storage, study_id, TEST_SCORE) is not None


def store_result(config: StudyConfig, key: str, value: Mapping[str, object]) -> None:
    """Put a result into the study, in the place of an older one."""
    with explained_errors(config):
        study = optuna.load_study(study_name=config.name, storage=open_storage(config))
        study.set_user_attr(key, json.dumps(value))
