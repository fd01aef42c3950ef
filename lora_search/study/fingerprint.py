"""What must stay the same within a study: every setting that changes a trial's numbers, the space, and the
content of the files that settings name (`content.*` and `data_hash`: weights, tokenizer, rows, layers).

A range of numbers may widen, as Optuna allows, and choices may be added. The source of the rows may change as
long as the rows are the same.
"""

import math
from collections.abc import Mapping

from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from lora_search.errors import FingerprintError
from lora_search.settings.schema import SweepConfig, as_dict
from lora_search.settings.space import Space

ATTRIBUTE = "fingerprint"
FREE_SECTIONS = (  # the space has its own rule
    "study", "engine", "tracker", "launcher", "artifacts", "metric", "runs_dir", "space",
)  # fmt: skip
SPACE, CONTENT = "space.", "content."
DATA_COMMIT = "content.commit of "  # a hub data set's name follows
FREE = (
    "Free to change: study.* except its name, engine.* except its dtype, tracker, launcher, artifacts, "
    "metric, runs_dir, and the place of the same rows. A range in the space may widen (not narrow), and "
    "choices may be added (none taken out)."
)
CAUSES = {
    "data_hash": "the rows of data.path changed",
    "content.weights": "the weights of model.path changed",
    "content.config": "config.json of model.path changed",
    "content.code": "the Python code of model.path changed (model.trust_remote_code)",
    "content.tokenizer": "the tokenizer of model.path changed",
    "content.chat_template": "the chat template of model.path changed",
    "content.layers": "the layers of model.path that can carry adapters changed",
}
EFFECTS = {  # of a cause above or a setting: named only if none of those has changed
    "content.train": "the training rows changed, as the model reads them",
    "content.validation": "the validation rows changed, as the model reads them",
    "content.test": "the test rows changed, as the model reads them",
}
READS_ROWS = (  # where the rows are and how they are read: free as long as the rows are the same
    "data.path", "data.validation_path", "data.test_path", "data.subset", "data.split", "data.revision",
    "data.format", "data.encoding", "data.on_bad_row", "data.on_control_text", "data.on_leakage",
)  # fmt: skip
CAPS = {"data.max_train_examples": "train", "data.max_validation_examples": "validation"}
DEMO_CAPS = ("data.demo_train_examples", "data.demo_validation_examples")
COLUMNS = "data.columns."


def settings_part(config: SweepConfig) -> dict[str, str]:
    """Return the settings that change a trial's numbers."""
    sections = {k: value for k, value in as_dict(config).items() if k not in FREE_SECTIONS}
    texts = {key: text for name, value in sections.items() for key, text in flat(name, value).items()}
    caps = {key: str(config.data.cap(split)) for key, split in CAPS.items()}  # with auto resolved
    return {key: text for key, text in {**texts, **caps}.items() if key not in DEMO_CAPS}


def space_part(space: Space) -> dict[str, str]:
    """Return the space in Optuna's JSON, `space.KEY[PARENT=CHOICE]` for a key that some trials have."""
    always = {f"{SPACE}{key}": distribution_to_json(d) for key, d in space.distributions.items()}
    return always | {
        f"{SPACE}{key}[{when.parent}={choice}]": distribution_to_json(d)
        for key, when in space.conditions.items()
        for choice, d in when.branches.items()
    }


def flat(prefix: str, value: object) -> dict[str, str]:
    """Return dotted key -> value as text."""
    if not isinstance(value, dict):
        return {prefix: str(value)}
    return {
        key: text for name, child in value.items() for key, text in flat(f"{prefix}.{name}", child).items()
    }


def check_fingerprint(study_name: str, stored: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Return the permitted changes as text: ranges that have widened, other places of the same rows.

    Raises FingerprintError if the study was made with other settings or inputs. Keys that a study of an older
    version lacks are not compared, except settings, which then count as their defaults.
    """
    known = {**_defaults(stored, wanted), **stored}
    keys = [key for key in sorted({*known, *wanted}) if known.get(key) != wanted.get(key)]
    keys = [key for key in keys if key in stored or not key.startswith(CONTENT)]
    free = [key for key in keys if _widens(key, known, wanted) or _leads_to_same_rows(key, stored, wanted)]
    refused = [key for key in keys if key not in free]
    if set(refused) - EFFECTS.keys():
        refused = [key for key in refused if key not in EFFECTS]
    refuse_changes(study_name, [_words(key, known, wanted) for key in refused])
    return [_words(key, known, wanted) for key in free if key in stored]


def known_so_far(stored: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a stored fingerprint to compare before the model is loaded."""
    return {key: value for key, value in stored.items() if key in wanted or not key.startswith(CONTENT)}


def _defaults(stored: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Return the defaults of settings that are newer than the study."""
    return {k: v for k, v in settings_part(SweepConfig()).items() if k in wanted and k not in stored}


def refuse_changes(study_name: str, changes: list[str]) -> None:
    """Raise FingerprintError if there are changes."""
    if changes:
        listed = "\n  ".join(changes)
        raise FingerprintError(
            f"study.name: {study_name!r} was started with other settings or inputs:\n  {listed}\n"
            f"Choose a new study.name, or restore these. {FREE}"
        )


def _leads_to_same_rows(key: str, stored: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Return whether the key only says where rows come from, and the rows are the same."""
    is_cap = key in CAPS and "content.train" in stored
    if key not in READS_ROWS and not key.startswith((COLUMNS, DATA_COMMIT)) and not is_cap:
        return False
    contents = [k for k in ("data_hash", *EFFECTS) if k in stored]
    return bool(contents) and all(stored[k] == wanted.get(k) for k in contents)


def _widens(key: str, stored: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Return whether the key is a range, or choices, that still contains all its earlier values."""
    if not key.startswith(SPACE) or key not in wanted:
        return False
    if key not in stored:
        return _is_of_new_choice(key, stored)
    old, new = json_to_distribution(stored[key]), json_to_distribution(wanted[key])
    if isinstance(old, CategoricalDistribution) and isinstance(new, CategoricalDistribution):
        return all(choice in new.choices for choice in old.choices)
    both_float = isinstance(old, FloatDistribution) and isinstance(new, FloatDistribution)
    both_int = isinstance(old, IntDistribution) and isinstance(new, IntDistribution)
    if not (both_float or both_int):
        return False
    assert isinstance(old, (FloatDistribution, IntDistribution))
    assert isinstance(new, (FloatDistribution, IntDistribution))
    if (old.log, old.step) != (new.log, new.step) or new.low > old.low or new.high < old.high:
        return False
    return old.step is None or abs(math.remainder(old.low - new.low, old.step)) < 1e-9 * old.step


def _is_of_new_choice(key: str, stored: Mapping[str, str]) -> bool:
    """Return whether the key is searched only where another has a choice that it had not before."""
    parent, _, choice = key.partition("[")[2].removesuffix("]").partition("=")
    if f"{SPACE}{parent}" not in stored:
        return False
    old = json_to_distribution(stored[f"{SPACE}{parent}"])
    return isinstance(old, CategoricalDistribution) and choice not in map(str, old.choices)


def changed_choices(
    stored: Mapping[str, str], wanted: Mapping[str, str]
) -> dict[str, CategoricalDistribution]:
    """Return the searched keys whose choices are others than they were."""
    keys = [k for k, text in wanted.items() if k.startswith(SPACE) and stored.get(k, text) != text]
    found = {key.removeprefix(SPACE).partition("[")[0]: json_to_distribution(wanted[key]) for key in keys}
    return {key: d for key, d in found.items() if isinstance(d, CategoricalDistribution)}


def _words(key: str, stored: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """Return the change in words."""
    if key in CAUSES:
        return CAUSES[key]
    if key in EFFECTS:
        return f"{EFFECTS[key]} (their order, a library, or this version of lora_search)"
    name = "the commit of model.path" if key == "content.commit" else key.removeprefix(CONTENT)
    return f"{name}: {_value(key, stored)} -> {_value(key, wanted)}"


def _value(key: str, fingerprint: Mapping[str, str]) -> str:
    """Return the value in words."""
    if key not in fingerprint or not key.startswith(SPACE):
        return fingerprint.get(key, "not set")
    distribution = json_to_distribution(fingerprint[key])
    if isinstance(distribution, CategoricalDistribution):
        return f"choice of {', '.join(map(str, distribution.choices))}"
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    step = "" if distribution.step in (None, 1) else f" in steps of {distribution.step}"
    return f"{distribution.low} to {distribution.high}{step}{', log' if distribution.log else ''}"
