"""Hydra composes a sweep: `sweeps/NAME.yaml` over the groups in `conf/` and the command line, into a
SweepConfig.

A sweep on the command line (`optim.lr=interval(1e-5,1e-3)`, quoted or not) is taken as `space.optim.lr`.
"""

import difflib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from lora_search.errors import InputError, LoraSearchError
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.settings.secrets import redact, remember
from lora_search.settings.sweep_file import (
    BEGIN,
    check_groups,
    check_sweep_file,
    explain_yaml,
    line_of,
    read_text,
)

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent  # a wheel carries both folders inside
SWEEPS, CONF = ROOT / "sweeps", ROOT / "conf"
DEFAULT_SWEEP = "construction_faq"
HELP = """\
Search LoRA hyperparameters: many trials train packed over one frozen base model.

  python -m lora_search.sweep -cn SWEEP group=choice key=value 'key=interval(a, b)'

  python -m lora_search.sweep data=jsonl data.path=my.jsonl study.name=mine
  python -m lora_search.sweep 'optim.lr=tag(log, interval(1e-5, 1e-3))' 'lora.r=choice(8, 16)'
  python -m lora_search.sweep -cd my/folder -cn my_sweep

== Sweeps (-cn) ==
{sweeps}

== Configuration groups (group=choice) ==
{groups}

== Settings of {name} (key=value) ==
{settings}
--cfg job shows what a command would run; --hydra-help lists the other flags.
"""


class GroupsPlugin(SearchPathPlugin):  # type: ignore[misc]  # hydra's plugin base is untyped
    """Puts the config groups on the search path, so that `--help` lists them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("lora_search", f"file://{CONF}")


Plugins.instance().register(GroupsPlugin)
ConfigStore.instance().store(name="schema", node=SweepConfig)


def compose(config_name: str, overrides: Sequence[str], more: Path | None = None) -> SweepConfig:
    """Return the checked settings of a sweep, found in sweeps/ or in a folder of one's own (``more``).

    Raises InputError with one message for whatever is wrong.
    """
    composed = _compose(config_name, overrides, more)
    with _explained(config_name, more):
        _remember(OmegaConf.to_container(composed, resolve=True))
        config = OmegaConf.to_object(composed)
    assert isinstance(config, SweepConfig)
    return config


def compose_study(
    config_name: str, overrides: Sequence[str], more: Path | None = None
) -> tuple[StudyConfig, str]:
    """Return where a sweep's study lies and its runs_dir; data.path and the like need not be given."""
    composed = _compose(config_name, overrides, more)
    with _explained(config_name, more):
        _remember(OmegaConf.to_container(composed.study, resolve=True))
        study, runs_dir = OmegaConf.to_object(composed.study), str(composed.runs_dir)
    assert isinstance(study, StudyConfig)
    SweepConfig(runs_dir=runs_dir)
    return study, runs_dir


def check_composes(
    config_name: str, overrides: Sequence[str], more: Path | None = None, *, resolve: bool = False
) -> None:
    """Raise InputError where the settings cannot be composed, or resolved; none need be given."""
    composed = _compose(config_name, overrides, more)
    if resolve:
        with _explained(config_name, more):
            OmegaConf.to_container(composed, resolve=True)


def compose_section(config_name: str, overrides: Sequence[str], more: Path | None, section: str) -> object:
    """Return one section of a sweep's settings, checked; the others need not be given."""
    composed = _compose(config_name, overrides, more)
    with _explained(config_name, more):
        return OmegaConf.to_object(composed[section])


def help_page(config_name: str, overrides: Sequence[str], more: Path | None = None) -> str:
    """Return what --help shows: sweeps, groups and settings. Hydra's own page takes twice as long."""
    sweeps = "\n".join(f"  {path.stem:<22}{_question(path)}" for path in _files(SWEEPS, more, "*.yaml"))
    groups: dict[str, list[str]] = {}
    for path in _files(CONF, more, "*/**/*.yaml"):
        root = CONF if path.is_relative_to(CONF) else more
        assert root is not None
        groups.setdefault(path.parent.relative_to(root).as_posix(), []).append(path.stem)
    listed = "\n".join(f"  {group}: {', '.join(names)}" for group, names in sorted(groups.items()))
    return HELP.format(
        sweeps=sweeps,
        groups=listed,
        name=config_name,
        settings=OmegaConf.to_yaml(_compose(config_name, overrides, more)),
    )


def as_override(text: str) -> str:
    """Return the override with a sweep turned into text under `space`; anything else as it is.

    Raises InputError for what Hydra would answer with a traceback.
    """
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return text  # composing reports it
    key = override.key_or_group
    if not key:
        raise InputError(f"{text}: has no key. Write key=value.")
    if override.is_sweep_override():
        key = key if key.startswith("space.") else f"space.{key}"
        return f"++{key}={_quoted(text.partition('=')[2])}"
    if (CONF / key).is_dir() and not override.is_delete():
        _check_choice(text, key, override.value())
    return f"++{text}" if key.startswith("space.") else text


def _check_choice(text: str, group: str, choice: object) -> None:
    """Raise InputError for what is no choice of a group, and for several of one that takes one."""
    if not isinstance(choice, str | list):
        raise InputError(f"{text}: names no choice of the group {group}. Leave the group out with ~{group}.")
    if isinstance(choice, list) and len(choice) > 1 and not group.startswith("space"):
        raise InputError(f"{text}: names {len(choice)} choices, and only the last would count. Name one.")


def _compose(config_name: str, overrides: Sequence[str], more: Path | None) -> DictConfig:
    """Return the settings as Hydra composes them, with no key that is not in the schema."""
    first, others = _search_path(config_name, more)
    texts = [as_override(text) for text in overrides]
    texts += [f"hydra.searchpath=[{_quoted(f'file://{folder}')}]" for folder in others]
    with (
        _explained(config_name, more),
        warnings.catch_warnings(),
        initialize_config_dir(str(first), version_base="1.3", job_name="lora_search"),
    ):
        warnings.filterwarnings(
            "ignore", message=".*Defaults list is missing `_self_`"
        )  # its values count last
        composed: DictConfig = hydra_compose(config_name, overrides=texts)
    if OmegaConf.get_type(composed) is not SweepConfig:
        raise InputError(f"-cn {config_name}: is no sweep: it lacks `schema`. {BEGIN}.")
    plain = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(plain, dict)
    _remember(plain)
    unknown = sorted({*_leaves(plain)} - {*known_keys()})
    if unknown:
        raise InputError(_place(f"{unknown[0]}:", config_name, more) + _unknown(unknown[0]))
    return composed


def _search_path(config_name: str, more: Path | None) -> tuple[Path, list[Path]]:
    """Return the folder that the sweep is in, and the others to look for groups in."""
    if more is None:
        return SWEEPS, []
    if not (os.path.isdir(more) and os.access(more, os.R_OK | os.X_OK)):
        raise InputError(
            f"-cd {more}: no such folder, or it may not be read. Give the folder of your sweeps."
        )
    own = _own_file(config_name, more)
    assert own is not None
    check_groups(more, CONF)
    if os.path.lexists(own):
        check_sweep_file(own)
        return more.resolve(), [SWEEPS]  # Hydra looks for a primary config in its first folder only
    other = own.with_suffix(".yml")
    if config_name.endswith(".yml") or other.is_file():
        raise InputError(
            f"-cn {config_name}: a sweep's file ends in .yaml. Rename {other.name} to {own.name}."
        )
    return SWEEPS, [more.resolve()]


@contextmanager
def _explained(config_name: str, more: Path | None) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into one InputError."""
    try:
        yield
    except LoraSearchError:
        raise
    except RecursionError:
        loop = "something refers to itself: defaults that lead back, or ${...} that do"
        raise InputError(f"-cn {config_name}: cannot be composed, {loop}. Break the loop.") from None
    except yaml.YAMLError as error:
        raise InputError(redact(explain_yaml(error, config_name))) from None
    except Exception as error:  # noqa: BLE001 (Hydra answers strange files with whatever its code runs into)
        said = _explain(error, config_name, more)
        raise InputError(redact(f"{_place(said, config_name, more)}{said}")) from None


def _own_file(config_name: str, more: Path | None) -> Path | None:
    name = config_name.removesuffix(".yaml").removesuffix(".yml")
    return None if more is None else more.resolve() / f"{name}.yaml"


def _place(said: str, config_name: str, more: Path | None) -> str:
    """Return file and line of the key that a message begins with, where one's own sweep file has it."""
    own = _own_file(config_name, more)
    line = None if own is None or not own.is_file() else line_of(own, said.partition(":")[0])
    return "" if line is None else f"{own}, line {line}: "


def _quoted(text: str) -> str:
    """Return the text in quotes of Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _explain(error: Exception, config_name: str, more: Path | None) -> str:
    """Return one line that names key, rule and remedy, from Hydra's or OmegaConf's own words."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    said = str(cause).partition("raised while composing config:\n")[2] or str(cause)
    text = " ".join(line.strip() for line in (str(error) or str(cause)).splitlines() if line.strip())
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {_unreadable(text, error.override)}"
    if isinstance(cause, InterpolationResolutionError | GrammarParseError):
        return _unresolved(cause)
    missing = _first(r"Could not find '([^']+)'", text)
    if missing:
        if "Available" not in text:
            return f"{missing}: there is no such group. --help lists the groups and their choices."
        available = text[text.find("Available") :].partition(" Config search")[0]
        return f"{missing}: there is no such choice. {available}."
    unloaded = _first(r"Could not load '([^']+)'", text)
    if unloaded:
        return f"defaults: there is no file {unloaded}.yaml. Name one of sweeps/ or of your folder."
    misfit = re.search(
        r"Merge error: (\w+) is not a subclass of (\w+?)Conf(?:ig)?\. value: (.*?) full_key", text
    )
    if misfit:
        rule = "must be a group of settings (key: value, indented below it)"
        return f"{misfit[2].lower()}: {rule}, got {misfit[3]}. Compare with the files in sweeps/."
    if "Cannot merge DictConfig with ListConfig" in text:
        where = _first(r"full_key: ([^\s=]+)(?= |$)", text)
        place = "space" if where is None or where.startswith("object_type") else where
        return f"{place}: must be settings (key: value, indented below it), got a list."
    key = _first(r"full_key: (\S+)", str(cause)) or _first(r"Could not (?:override|delete).* '([^']+)'", text)
    if "MissingConfig" in type(error).__name__ and "primary config" in text:
        names = _listed([path.stem for path in _files(SWEEPS, more, "*.yaml")])
        return f"-cn {config_name}: no such sweep. There are: {names}; or give a folder of yours with -cd."
    if any(words in text for words in ("is not in struct", "Could not delete")) or "not in '" in str(cause):
        return _unknown(key or "")
    if "does not support deletion" in str(cause):
        return f"~{key}: a setting cannot be left out. Give it a value; groups can be left out (~space/lora)."
    if "missing mandatory value" in text.casefold():
        return f"{key}: must be given, got ???. Add {key}=VALUE to the command."
    if "is not Optional" in str(cause):
        return f"{key}: must have a value, got null."
    if key:
        return f"{key}: {said.splitlines()[0]}. {_example(key)}"
    named = text or type(error).__name__
    return f"-cn {config_name}: the settings cannot be composed: {named}. Compare with the files in sweeps/."


def _unresolved(error: OmegaConfBaseException) -> str:
    """Return what is wrong with a ${...}, and what can be written there."""
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
        return f"{key}: ${{{missing}}} names no setting. {remedy}."
    if "recursi" in text.lower():
        return f"{key}: refers to itself by ${{...}}. Break the loop."
    said = text.partition(" full_key:")[0].rstrip(".")
    return f"{key}: ${{...}} cannot be resolved ({said}). Write ${{study.name}} or ${{oc.env:NAME}}."


def _unreadable(text: str, override: str) -> str:
    """Return what is wrong with an override that breaks Hydra's grammar, and how to write it."""
    key, equals, value = override.partition("=")
    if not equals:
        return "has no value. Write key=value, or see --help."
    if "NoneType" in text:
        return "null cannot be among the choices of Hydra's grammar. Leave it out."
    evaluated = _first(r"while evaluating '.*?': (.+)", text)
    if evaluated:
        return f"cannot be read: {evaluated.partition(' See ')[0]}."
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    remedy = f"Quote the value for Hydra and for the shell: '{key}=\"{quoted}\"'"
    return f"cannot be read by Hydra's grammar. {remedy}"


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.5)
    return f"{key}: there is no such setting. " + (
        f"Did you mean {', '.join(near)}?" if near else "See --help."
    )


def _example(key: str) -> str:
    """Return what a value of the setting looks like."""
    default = OmegaConf.select(OmegaConf.structured(SweepConfig), key)
    return "See --help." if default is None or OmegaConf.is_config(default) else f"Its default is {default}."


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _listed(names: Sequence[str], most: int = 12) -> str:
    """Return the names, a long list cut with a count."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _files(ours: Path, more: Path | None, pattern: str) -> list[Path]:
    return sorted(ours.glob(pattern)) + (sorted(more.glob(pattern)) if more is not None else [])


def _question(sweep: Path) -> str:
    """Return the comment that a sweep begins with; nothing for a file that cannot be read."""
    try:
        first = read_text(sweep).partition("\n")[0]
    except InputError as error:
        return f"({str(error).removeprefix(f'{sweep}').lstrip(': ,')})"
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def known_keys() -> list[str]:
    """Return every setting as its dotted key."""
    plain = OmegaConf.to_container(OmegaConf.structured(SweepConfig), resolve=False)
    assert isinstance(plain, dict)
    return sorted(_leaves(plain))


def _leaves(node: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys outside `space`, whose keys are free until it is parsed."""
    for name, child in node.items():
        if f"{prefix}{name}" == "space":
            continue
        if isinstance(child, Mapping) and child:
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _remember(node: object) -> None:
    """Keep the passwords and keys among the settings in mind, so that no message says one."""
    if isinstance(node, str):
        if "${" not in node:  # what it comes to is looked at once it is resolved
            remember(node)
    elif isinstance(node, Mapping | list):
        for child in node.values() if isinstance(node, Mapping) else node:
            _remember(child)
