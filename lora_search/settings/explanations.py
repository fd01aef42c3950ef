"""Turns the exceptions of Hydra and OmegaConf into one message: key, rule, remedy."""

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from hydra.core.override_parser.types import Quote
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from lora_search.settings.grammar import quoted
from lora_search.settings.schema import SweepConfig
from lora_search.settings.train_schema import NOT_OFFERED_INITS, PATTERNS


def explain(error: Exception, config_name: str, sweeps: Sequence[str]) -> str:
    """Return one line that names key, rule and remedy, from the text that Hydra or OmegaConf raised."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(line.strip() for line in (str(error) or str(cause)).splitlines() if line.strip())
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {_unreadable(text, error.override)}"
    if isinstance(cause, InterpolationResolutionError | GrammarParseError):
        return _unresolved(cause)
    if "MissingConfig" in type(error).__name__ and "primary config" in text:
        remedy = f"There are: {_listed(sweeps)}; or give your own folder with -cd"
        return f"-cn {config_name}: no such sweep. {remedy}."
    known = _not_found(text) or _misshapen(text) or _wrong_key(str(cause), text)
    said = text or type(error).__name__
    return known or (
        f"-cn {config_name}: the settings cannot be composed: {said}. Compare with the files in sweeps/."
    )


def _not_found(text: str) -> str | None:
    """Return the message if a group, a choice or a file does not exist."""
    missing, unloaded = _first(r"Could not find '([^']+)'", text), _first(r"Could not load '([^']+)'", text)
    if missing and "Available" not in text:
        return f"{missing}: there is no such group. --help lists the groups and their choices."
    if missing:
        available = text[text.find("Available") :].partition(" Config search")[0]
        return f"{missing}: there is no such choice. {available}."
    if unloaded:
        return f"defaults: there is no file {unloaded}.yaml. Name one of sweeps/ or of your folder."
    return None


def _misshapen(text: str) -> str | None:
    """Return the message if a value was given for a group, or a list for settings."""
    merge = r"Merge error: (\w+) is not a subclass of (\w+?)Conf(?:ig)?\. value: (.*?) full_key"
    if misfit := re.search(merge, text):
        rule = "must be a group of settings (key: value, indented below it)"
        return f"{misfit[2].lower()}: {rule}, got {misfit[3]}. Compare with the files in sweeps/."
    if "Cannot merge DictConfig with ListConfig" in text:
        where = _first(r"full_key: ([^\s=]+)(?= |$)", text)
        place = "space" if where is None or where.startswith("object_type") else where
        return f"{place}: must be settings (key: value, indented below it), got a list."
    return None


def _wrong_key(cause: str, text: str) -> str | None:
    """Return the message if one key is unknown, missing, or has an impossible value."""
    key = _first(r"full_key: (\S+)", cause) or _first(r"Could not (?:override|delete).* '([^']+)'", text)
    if any(words in text for words in ("is not in struct", "Could not delete")) or "not in '" in cause:
        return unknown(key or "")
    if "does not support deletion" in cause:
        return f"~{key}: a setting cannot be left out. Give it a value; groups can be left out (~space/lora)."
    if "missing mandatory value" in text.casefold():
        return f"{key}: is not set. Add {key}=VALUE to the command."
    if "is not Optional" in cause:
        return f"{key}: must have a value, got null."
    said = cause.partition("raised while composing config:\n")[2] or cause
    return f"{key}: {said.splitlines()[0]}. {_example(key)}" if key else None


def _unresolved(error: OmegaConfBaseException) -> str:
    """Return the message for a ${...} that cannot be resolved."""
    text = " ".join(str(error).split())
    key = _first(r"full_key: (\S+)", text) or str(getattr(error, "full_key", None) or "a setting")
    variable = _first(r"Environment variable '([^']*)' not found", text)
    if variable is not None:
        remedy = f"Set it (export {variable}=...), or give a default: ${{oc.env:{variable},DEFAULT}}"
        return f"{key}: the environment variable {variable} is not set. {remedy}."
    resolver = _first(r"Unsupported interpolation type (\S+)", text)
    if resolver is not None:
        remedy = "Write ${oc.env:NAME} for a variable, ${study.name} for another setting"
        return f"{key}: there is no resolver {resolver} for ${{...}}. {remedy}."
    missing = _first(r"Interpolation key '([^']*)' not found", text)
    if missing is not None:
        near = difflib.get_close_matches(missing, known_keys(), n=1)
        remedy = f"Did you mean ${{{near[0]}}}" if near else "Write the full key of a setting: ${model.path}"
        return f"{key}: ${{{missing}}} is not a setting. {remedy}."
    if "recursi" in text.lower():
        return f"{key}: refers to itself by ${{...}}. Break the loop."
    said = text.partition(" full_key:")[0].rstrip(".")
    return f"{key}: ${{...}} cannot be resolved ({said}). Write ${{study.name}} or ${{oc.env:NAME}}."


def _unreadable(text: str, override: str) -> str:
    """Return the message for an override that Hydra's grammar does not allow."""
    key, equals, value = override.partition("=")
    if not equals:
        return "has no value. Write key=value, or see --help."
    if "NoneType" in text:
        return "null cannot be a choice in Hydra's grammar. Leave it out."
    evaluated = _first(r"while evaluating '.*?': (.+)", text)
    if evaluated:
        return f"cannot be read: {evaluated.partition(' See ')[0]}."
    remedy = shlex.quote(f"{key}={quoted(value, Quote.double)}")
    return f"cannot be read by Hydra's grammar. Quote the value for Hydra and for the shell: {remedy}"


OF_PEFT = ("lora_bias", "target_parameters", "exclude_modules", "ensure_weight_tying", "layer_replication")
NOT_OFFERED = (
    "is an option of PEFT that is not offered: a trial trains A and B of the decoder's linear layers, with "
    "lora.use_dora their magnitudes, with lora.bias=lora_only their biases, and embedding and head with "
    "lora.modules_to_save or rows of them with lora.trainable_token_indices, but no experts, and the base is "
    "shared. Leave it out; docs/options.md has what can be set"
)


def unknown(key: str) -> str:
    init = key.removeprefix("lora.").partition(".")[0].removesuffix("_config")
    if key.startswith("lora.") and init in NOT_OFFERED_INITS:
        return f"{key}: there is no such setting, as {init} {NOT_OFFERED_INITS[init]} (lora.init)."
    if key.startswith("lora.") and key.removeprefix("lora.").partition(".")[0] in OF_PEFT:
        return f"{key}: {NOT_OFFERED}."
    near = difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.5)
    return f"{key}: there is no such setting. " + (
        f"Did you mean {', '.join(near)}?" if near else "See --help."
    )


def _example(key: str) -> str:
    """Return the default of the setting, as an example of its form."""
    default = OmegaConf.select(OmegaConf.structured(SweepConfig), key)
    return "See --help." if default is None or OmegaConf.is_config(default) else f"Its default is {default}."


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _listed(names: Sequence[str], most: int = 12) -> str:
    """Return the names; a long list ends with the number of the rest."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@cache  # 30 ms, for each override of a command line
def known_keys() -> tuple[str, ...]:
    """Return the dotted keys of all settings."""
    plain = OmegaConf.to_container(OmegaConf.structured(SweepConfig), resolve=False)
    assert isinstance(plain, dict)
    return tuple(sorted(leaves(plain)))


def leaves(node: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys outside `space`; `parse_space` checks the keys inside."""
    for name, child in node.items():
        if f"{prefix}{name}" == "space":
            continue
        if isinstance(child, Mapping) and child and f"{prefix}{name}" not in PATTERNS:
            yield from leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
