"""The identity of a study: a unique id, and the fingerprint and base perplexity from its first start.

A name is not enough: two databases may each have a study of that name, and a study may be deleted and started
again.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.storages import RDBStorage

from lora_search.database.storage import explained_errors, open_storage
from lora_search.database.stored_study import outline_of
from lora_search.database.write_once import write_once
from lora_search.settings.schema import DataConfig, StudyConfig
from lora_search.study.fingerprint import ATTRIBUTE, DATA_COMMIT

ID, OLDER = "study_id", "begun_without_id"
ID_DIGITS = 12  # 48 bits


@dataclass(frozen=True)
class Identity:
    """The recorded identity. ``is_older``: the study was started by a version that gave studies no id."""

    id: str | None = None
    is_older: bool = False
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    base_perplexity: float | None = None

    @property
    def commit(self) -> str | None:
        """The commit that a hub id was resolved to at the first start."""
        return self.fingerprint.get("content.commit")

    def commits_of(self, config: DataConfig) -> dict[str, str]:
        """Return hub data set -> the commit that it had when the study was started, unless the settings name
        another revision now."""
        if self.fingerprint.get("data.revision", "None") != str(config.revision):
            return {}
        return {
            key.removeprefix(DATA_COMMIT): commit
            for key, commit in self.fingerprint.items()
            if key.startswith(DATA_COMMIT)
        }


def read_identity(attributes: Mapping[str, Any]) -> Identity:
    """Return the identity from a study's attributes. Values of another form count as missing."""
    has_begun, fingerprint = ATTRIBUTE in attributes, attributes.get(ATTRIBUTE)
    return Identity(
        id=str(attributes[ID]) if ID in attributes else None,
        is_older=OLDER in attributes or (has_begun and ID not in attributes),
        fingerprint={k: str(v) for k, v in fingerprint.items()} if isinstance(fingerprint, dict) else {},
        base_perplexity=number_of(attributes, "base_perplexity"),
    )


def number_of(attributes: Mapping[str, Any], key: str) -> float | None:
    """Return a numeric attribute, stored as number or text; None if it is missing or not a number."""
    try:
        return float(attributes[key])
    except (KeyError, ValueError, TypeError):
        return None


def find_identity(config: StudyConfig) -> Identity | None:
    """Return the identity of the study that the settings name; None if it does not exist. Creates nothing."""
    if outline_of(config) is None:
        return None
    storage = open_storage(config)
    with explained_errors(config):
        study_id = storage.get_study_id_from_name(config.name)
        return read_identity(storage.get_study_user_attrs(study_id))


def give_identity(storage: RDBStorage, study_name: str, fingerprint: Mapping[str, str]) -> Identity:
    """Give a new study its id and fingerprint, an older one its id; return what is stored, which another
    worker may have written."""
    study_id = storage.get_study_id_from_name(study_name)
    before = storage.get_study_user_attrs(study_id)
    mark = {OLDER: True} if read_identity(before).is_older else {}
    write_once(storage, study_id, {ID: uuid.uuid4().hex[:ID_DIGITS], **mark})
    return read_identity(write_once(storage, study_id, {ATTRIBUTE: dict(fingerprint)}))
