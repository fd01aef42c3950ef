"""What is stored under a study's name, by any program. Read-only: creates no file and no table."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from optuna.storages._rdb.models import (
    StudyDirectionModel,
    StudyModel,
    StudySystemAttributeModel,
    StudyUserAttributeModel,
    TrialModel,
)
from sqlalchemy import create_engine, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from lora_search.database.drivers import engine_options
from lora_search.database.storage import check_storage, explained_errors
from lora_search.settings.schema import StudyConfig


@dataclass(frozen=True)
class StudyOutline:
    """Directions, trials and attribute keys of a stored study."""

    directions: tuple[str, ...]  # MINIMIZE or MAXIMIZE, one per objective
    has_trials: bool
    attributes: frozenset[str]  # keys
    system: Mapping[str, str]  # attributes of programs: key -> JSON


def outline_of(config: StudyConfig) -> StudyOutline | None:
    """Return the outline of the study; None if it does not exist. Raises as ``check_storage`` does."""
    check_storage(config)
    url = make_url(config.storage)
    if url.get_backend_name() == "sqlite" and not os.path.exists(url.database or ""):
        return None
    engine = create_engine(url, **engine_options(url))
    try:
        with explained_errors(config):
            return _read(Session(engine), config.name) if inspect(engine).has_table("studies") else None
    finally:
        engine.dispose()


def _read(session: Session, name: str) -> StudyOutline | None:
    with session:
        study = session.query(StudyModel).filter_by(study_name=name).one_or_none()
        if study is None:
            return None
        directions = session.query(StudyDirectionModel).filter_by(study_id=study.study_id)
        attributes = session.query(StudyUserAttributeModel).filter_by(study_id=study.study_id)
        system = session.query(StudySystemAttributeModel).filter_by(study_id=study.study_id)
        trials = session.query(TrialModel).filter_by(study_id=study.study_id)
        return StudyOutline(
            directions=tuple(row.direction.name for row in directions.order_by("objective")),
            has_trials=trials.first() is not None,
            attributes=frozenset(str(row.key) for row in attributes),
            system={str(row.key): str(row.value_json) for row in system},
        )
