"""The settings of a sweep as its study recorded them, for commands that get only the study's name."""

import ast
import json
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from lora_search.settings.overlay import decoded
from lora_search.settings.schema import StudyConfig, SweepConfig

PREFIX = "setting/sweep."


def recorded_settings(attributes: Mapping[str, str]) -> dict[str, str]:
    """Return the sweep's settings as text, by their dotted keys."""
    return {key.removeprefix(PREFIX): text for key, text in attributes.items() if key.startswith(PREFIX)}


def recorded_values(attributes: Mapping[str, str], whole: Collection[str] = ()) -> dict[str, object]:
    """Return the sweep's settings with their types, by their dotted keys; those in ``whole`` in one piece if
    they are mappings."""
    if "settings" in attributes:
        return _flat("", json.loads(attributes["settings"]), whole)
    return {key: _literal(text) for key, text in recorded_settings(attributes).items()}  # an older version's


def trial_values(attributes: Mapping[str, str], params: Mapping[str, object]) -> dict[str, object]:
    """Return the sweep's settings with a trial's parameters laid over them."""
    return recorded_values(attributes, params) | {key: decoded(value) for key, value in params.items()}


def recorded_config(attributes: Mapping[str, str], study: StudyConfig) -> SweepConfig:
    """Return the sweep's checked settings, without its space, and with ``study`` in place of its own.

    Settings added in a later version get their defaults; settings dropped since are ignored.
    """
    config = _build(SweepConfig, "", recorded_values(attributes), recorded_settings(attributes))
    assert isinstance(config, SweepConfig)
    config.study = study
    return config


def _build(kind: type, prefix: str, values: Mapping[str, object], texts: Mapping[str, str]) -> Any:
    """Return an object of a settings class; fields that are not recorded keep their defaults."""
    chosen: dict[str, object] = {}
    for field in fields(kind):
        key, declared = f"{prefix}{field.name}", field.type
        if isinstance(declared, type) and is_dataclass(declared):
            chosen[field.name] = _build(declared, f"{key}.", values, texts)
        elif key in values:
            chosen[field.name] = texts.get(key, values[key]) if declared is str else values[key]
        elif declared is Any and (parts := _below(key, values)):
            chosen[field.name] = parts
    return kind(**chosen)


def _below(key: str, values: Mapping[str, object]) -> dict[str, object]:
    """Return the parts of a setting that is a mapping itself, as lora.rank_pattern."""
    return {k.removeprefix(f"{key}."): value for k, value in values.items() if k.startswith(f"{key}.")}


def _flat(prefix: str, tree: Mapping[str, object], whole: Collection[str] = ()) -> dict[str, object]:
    """Return dotted key -> value."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in whole:
            flat |= _flat(f"{prefix}{name}.", value, whole)
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _literal(text: str) -> object:
    """Return the value from the str() that an older version recorded."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
