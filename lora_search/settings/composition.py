"""Hydra composes a sweep: `sweeps/NAME.yaml` over the groups in `conf/` and the command line, into a
SweepConfig.

A sweep on the command line (`optim.lr=interval(1e-5,1e-3)`, quoted or not) is taken as `space.optim.lr`.
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_search.errors import InputError
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.settings.secrets import redact

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
    config = _checked(_compose(config_name, overrides, more), config_name, more)
    assert isinstance(config, SweepConfig)
    return config


def compose_study(
    config_name: str, overrides: Sequence[str], more: Path | None = None
) -> tuple[StudyConfig, str]:
    """Return where a sweep's study lies and its runs_dir; data.path and the like need not be given."""
    composed = _compose(config_name, overrides, more)
    study = _checked(composed.study, config_name, more)
    assert isinstance(study, StudyConfig)
    return study, str(composed.runs_dir)


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
    if (CONF / key).is_dir() and not override.is_delete() and not isinstance(override.value(), str | list):
        raise InputError(f"{text}: names no choice of the group {key}. Leave the group out with ~{key}.")
    return f"++{text}" if key.startswith("space.") else text


def _compose(config_name: str, overrides: Sequence[str], more: Path | None) -> DictConfig:
    """Return the settings as Hydra composes them, with no key that is not in the schema."""
    if more is not None and not (os.path.isdir(more) and os.access(more, os.R_OK | os.X_OK)):
        raise InputError(f"-cd {more}: no such folder, or it may not be read.")
    first, others = SWEEPS, [] if more is None else [more.resolve()]
    if others and (others[0] / f"{config_name.removesuffix('.yaml')}.yaml").is_file():
        first, others = others[0], [SWEEPS]  # Hydra looks for a primary config in its first folder only
    texts = [as_override(text) for text in overrides]
    texts += [f"hydra.searchpath=[{_quoted(f'file://{folder}')}]" for folder in others]
    try:
        with initialize_config_dir(str(first), version_base="1.3", job_name="lora_search"):
            composed: DictConfig = hydra_compose(config_name, overrides=texts)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(redact(_explain(error, config_name, more))) from None
    unknown = sorted({*_leaves(composed)} - {*known_keys()})
    if unknown:
        raise InputError(_unknown(unknown[0]))
    return composed


def _checked(composed: DictConfig, config_name: str, more: Path | None) -> object:
    """Return typed settings that have passed their own rules."""
    try:
        return OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(redact(_explain(error, config_name, more))) from None


def _quoted(text: str) -> str:
    """Return the text in quotes of Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _explain(error: Exception, config_name: str, more: Path | None) -> str:
    """Return one line that names key, rule and remedy, from Hydra's or OmegaConf's own words."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {_unreadable(text, error.override)}"
    missing = _first(r"Could not find '([^']+)'", text)
    if missing:
        available = text[text.find("Available") :].partition(" Config search")[0]
        return f"{missing}: there is no such choice. {available}."
    key = _first(r"full_key: (\S+)", str(cause)) or _first(r"Could not (?:override|delete).* '([^']+)'", text)
    if "MissingConfig" in type(error).__name__ and config_name in text:
        names = ", ".join(path.stem for path in _files(SWEEPS, more, "*.yaml"))
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
        return f"{key}: {str(cause).splitlines()[0]}."
    return f"The settings cannot be composed: {text}"


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


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _files(ours: Path, more: Path | None, pattern: str) -> list[Path]:
    return sorted(ours.glob(pattern)) + (sorted(more.glob(pattern)) if more is not None else [])


def _question(sweep: Path) -> str:
    """Return the comment that a sweep begins with."""
    first = sweep.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def known_keys() -> list[str]:
    """Return every setting as its dotted key."""
    return sorted(_leaves(OmegaConf.structured(SweepConfig)))


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys outside `space`, whose keys are free until it is parsed."""
    for name in map(str, node):
        child = None if OmegaConf.is_missing(node, name) else node[name]
        if f"{prefix}{name}" == "space":
            continue
        if isinstance(child, DictConfig) and child:
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
