"""What must stay the same under one study name: every setting that changes a trial's numbers, and the space.
A range of numbers may widen, as Optuna allows it; choices may not change."""

import math
from collections.abc import Mapping

from optuna import Study
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from lora_search.errors import FingerprintError

ATTRIBUTE = "fingerprint"
FREE = (
    "Free to change: study.* but its name, engine.* but its dtype, tracker, launcher, runs_dir. "
    "A range in the space may widen (not narrow); choices may not change."
)


def check_fingerprint(
    study: Study, settings: Mapping[str, str], distributions: Mapping[str, BaseDistribution]
) -> list[str]:
    """Store the fingerprint of a new study, or that a range has widened; return what has, for people.

    Raises FingerprintError where the study was made with other settings.
    """
    space = {f"space.{key}": distribution_to_json(d) for key, d in distributions.items()}
    fingerprint = {**settings, **space}
    stored: dict[str, str] = study.user_attrs.get(ATTRIBUTE, {})
    if stored == fingerprint:
        return []
    keys = [key for key in sorted({*stored, *fingerprint}) if stored.get(key) != fingerprint.get(key)]
    changes = {key: f"{key}: {_words(key, stored)} -> {_words(key, fingerprint)}" for key in keys}
    if stored:
        _refuse(study.study_name, [changes[key] for key in keys if not _widens(key, stored, fingerprint)])
    study.set_user_attr(ATTRIBUTE, fingerprint)
    return list(changes.values()) if stored else []


def _refuse(study_name: str, changes: list[str]) -> None:
    if changes:
        listed = "\n  ".join(changes)
        raise FingerprintError(
            f"study.name: {study_name!r} was started with other settings:\n  {listed}\n"
            f"Choose a new study.name, or put these back. {FREE}"
        )


def _widens(key: str, stored: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Return whether the key is a range that still holds every value it held."""
    if not key.startswith("space.") or key not in stored or key not in wanted:
        return False
    old, new = json_to_distribution(stored[key]), json_to_distribution(wanted[key])
    both_float = isinstance(old, FloatDistribution) and isinstance(new, FloatDistribution)
    both_int = isinstance(old, IntDistribution) and isinstance(new, IntDistribution)
    if not (both_float or both_int):
        return False
    assert isinstance(old, (FloatDistribution, IntDistribution))
    assert isinstance(new, (FloatDistribution, IntDistribution))
    if (old.log, old.step) != (new.log, new.step) or new.low > old.low or new.high < old.high:
        return False
    return old.step is None or abs(math.remainder(old.low - new.low, old.step)) < 1e-9 * old.step


def _words(key: str, fingerprint: Mapping[str, str]) -> str:
    """Return the value as people read it."""
    if key not in fingerprint or not key.startswith("space."):
        return fingerprint.get(key, "not set")
    distribution = json_to_distribution(fingerprint[key])
    if isinstance(distribution, CategoricalDistribution):
        return f"choice of {', '.join(map(str, distribution.choices))}"
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    step = "" if distribution.step in (None, 1) else f" in steps of {distribution.step}"
    return f"{distribution.low} to {distribution.high}{step}{', log' if distribution.log else ''}"
