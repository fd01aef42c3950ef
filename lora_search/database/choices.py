"""Adds choices to a study that has trials.

Optuna stores a choice as its index in the list of choices, with that list, and accepts no other list later.
So the lists and indices of all trials are rewritten, together with the study's attribute.
"""

import json
from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    CategoricalDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import StudyModel, StudyUserAttributeModel, TrialModel, TrialParamModel
from optuna.trial import TrialState
from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_search.database.storage import locked_from_the_start

PAUSED = "paused"  # as in search.trials


def write_choices(
    storage: RDBStorage,
    study_id: int,
    attribute: Mapping[str, object],
    choices: Mapping[str, CategoricalDistribution],
) -> list[int]:
    """Write the study's attribute and the new choices of these keys, all or nothing.

    Return the numbers of trials that run: then nothing is written. Nor is it where the attribute is as it
    should be already: of many starts at once, one writes.
    """
    ((key, value),) = attribute.items()
    with locked_from_the_start(), Session(storage.engine) as session, session.begin():
        StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        stored = session.query(StudyUserAttributeModel).filter_by(study_id=study_id, key=key).one()
        if json.loads(str(stored.value_json)) == value:
            return []
        if running := _running(session, study_id):
            return running
        for name, distribution in choices.items():
            _write_anew(session, study_id, name, distribution)
        stored.value_json = json.dumps(value)
    return []


def _running(session: Session, study_id: int) -> list[int]:
    """Return the numbers of the trials that a worker trains; paused ones have no worker."""
    trials = session.query(TrialModel).filter_by(study_id=study_id, state=TrialState.RUNNING)
    return [
        int(trial.number)
        for trial in trials.order_by(TrialModel.number)
        if not any(a.key == PAUSED and json.loads(a.value_json) for a in trial.user_attributes)
    ]


def _write_anew(session: Session, study_id: int, name: str, distribution: CategoricalDistribution) -> None:
    """Give the trials the new list of choices, and each choice its index there."""
    new, row = distribution_to_json(distribution), TrialParamModel
    trials = select(TrialModel.trial_id).where(TrialModel.study_id == study_id)
    mine = session.query(row).filter(row.param_name == name, row.trial_id.in_(trials))
    for text, place in mine.with_entities(row.distribution_json, row.param_value).distinct().all():
        old = json_to_distribution(text)
        if text == new or not isinstance(old, CategoricalDistribution):
            continue
        value = old.to_external_repr(place)
        if value in distribution.choices:  # else another program drew it
            changed: dict[Any, object] = {
                row.param_value: distribution.to_internal_repr(value),
                row.distribution_json: new,
            }
            old_ones = mine.filter(row.distribution_json == text, row.param_value == place)
            old_ones.update(changed, synchronize_session=False)
