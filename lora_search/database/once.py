"""Attributes that a study gets once: of several simultaneous starts the first writes, the others read."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from optuna.storages import RDBStorage
from optuna.storages._rdb.models import StudyUserAttributeModel
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session


def write_once(storage: RDBStorage, study_id: int, values: Mapping[str, object]) -> dict[str, Any]:
    """Store the attributes that the study lacks, in one transaction; return all of its attributes.

    The table has one row per study and key, so the second of two writers gets an IntegrityError.
    """
    attributes: dict[str, Any] = storage.get_study_user_attrs(study_id)
    lacking = {key: value for key, value in values.items() if key not in attributes}
    if not lacking:
        return attributes
    with suppress(IntegrityError), Session(storage.engine) as session, session.begin():
        for key, value in lacking.items():
            session.add(StudyUserAttributeModel(study_id=study_id, key=key, value_json=json.dumps(value)))
    return storage.get_study_user_attrs(study_id)


def read_attribute(storage: RDBStorage, study_id: int, key: str) -> Any:
    """Return one attribute of a study, as it is now; None if there is none."""
    row = StudyUserAttributeModel
    with Session(storage.engine) as session:
        text = session.query(row.value_json).filter_by(study_id=study_id, key=key).scalar()
    return None if text is None else json.loads(text)
