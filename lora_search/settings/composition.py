"""Composes a SweepConfig with Hydra, from `sweeps/NAME.yaml`, the groups in `conf/` and the command line.

A range on the command line (`optim.lr=interval(1e-5,1e-3)`, quoted or not) sets `space.optim.lr`.
"""

import os
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import ChoiceSweep, Quote
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from lora_search.errors import ConfigError, InputError, LoraSearchError
from lora_search.settings.explanations import explain, known_keys, leaves, unknown
from lora_search.settings.grammar import WhenCall, make_parser, quoted, unreadable, without_quotes
from lora_search.settings.overlay import searchable_keys
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
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent  # a wheel has both folders in the package
SWEEPS, CONF = ROOT / "sweeps", ROOT / "conf"
DEFAULT_SWEEP = "construction_faq"
HELP = """\
Search LoRA hyperparameters: many trials train packed over one frozen base model.

  python -m lora_search.sweep -cn SWEEP group=choice key=value 'key=interval(a, b)'

  python -m lora_search.sweep data=jsonl data.path=my.jsonl study.name=mine
  python -m lora_search.sweep 'optim.lr=tag(log, interval(1e-5, 1e-3))' 'lora.r=choice(8, 16)'
  python -m lora_search.sweep 'optim.schedule=choice(cosine, wsd)' \\
      'optim.decay_ratio=when(optim.schedule, wsd, choice(0.1, 0.3))'
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
    """Adds the config groups to the search path, so that `--help` lists them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("lora_search", f"file://{CONF}")


Plugins.instance().register(GroupsPlugin)
ConfigStore.instance().store(name="schema", node=SweepConfig)


def compose(config_name: str, overrides: Sequence[str], more: Path | None = None) -> SweepConfig:
    """Return the checked settings of a sweep from sweeps/ or from the user's own folder (``more``).

    Raises InputError with one message for any mistake.
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
    """Return a sweep's study settings and runs_dir; required settings like data.path may be missing."""
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
    """Raise InputError if the settings cannot be composed or resolved; required ones may be missing."""
    composed = _compose(config_name, overrides, more)
    if resolve:
        with _explained(config_name, more):
            OmegaConf.to_container(composed, resolve=True)


def compose_section(config_name: str, overrides: Sequence[str], more: Path | None, section: str) -> object:
    """Return one checked section of a sweep's settings; required settings elsewhere may be missing."""
    composed = _compose(config_name, overrides, more)
    with _explained(config_name, more):
        return OmegaConf.to_object(composed[section])


def help_page(config_name: str, overrides: Sequence[str], more: Path | None = None) -> str:
    """Return the text of --help: sweeps, groups and settings. Hydra's own page takes twice as long."""
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


TEXTS = ("study.storage", "artifacts.uri", "launcher.sbatch")  # may have = ? and , in them, without quotes


def as_override(text: str) -> str:
    """Return the override; one with a range becomes text under `space`.

    Raises InputError for overrides that crash Hydra, and for a sweep of a key that cannot be searched.
    """
    typed, _, value = text.partition("=")
    is_text = typed.lstrip("+") in TEXTS
    try:
        override = make_parser().parse_override(text)
    except HydraException as error:
        if is_text:
            return f"{typed}={quoted(value)}"
        if "when(" in value:  # Hydra's own parser does not know it
            raise InputError(redact(str(unreadable(typed, value, error)))) from None
        return text  # `compose` reports others
    key = override.key_or_group
    if not key:
        raise InputError(f"{text}: has no key. Write key=value.")
    if re.match(r"hydra[./@]|hydra$", key):
        raise InputError(
            f"{text}: Hydra only composes the settings here. Leave it out; runs_dir is the folder."
        )
    is_section = key in {known.partition(".")[0] for known in known_keys()} and not (CONF / key).is_dir()
    if override.is_delete() and is_section:
        raise InputError(f"~{key}: settings cannot be left out. Give them values; groups can be left out.")
    if override.is_sweep_override() or isinstance(override.value(), WhenCall):
        if is_text and _is_listed(override.value()):
            return f"{typed}={quoted(value)}"
        if not key.startswith("space."):
            _require_searchable(text, key, override.value())
            key = f"space.{key}"
        return f"++{key}={quoted(value)}"
    if (CONF / key).is_dir() and not override.is_delete():
        _check_choice(text, key, override.value())
    return f"++{text}" if key.startswith("space.") else text


def _is_listed(sweep: object) -> bool:
    """Return whether the sweep was typed with commas alone: 8,16."""
    return isinstance(sweep, ChoiceSweep) and sweep.simple_form


def _require_searchable(text: str, key: str, sweep: object) -> None:
    """Raise InputError if no trial may have its own value of the key."""
    if key in searchable_keys():
        return
    if (CONF / key).is_dir() and isinstance(sweep, ChoiceSweep):
        _check_choice(text, key, sweep.list)
    elif not any(f"{key}.".startswith(f"{known}.") for known in known_keys()):
        raise InputError(unknown(key))
    value, remedy = text.partition("=")[2], "Give one value."
    _remember([value, *map(without_quotes, sweep.list if isinstance(sweep, ChoiceSweep) else [])])
    shown = redact(value)  # before other quotes change how a password is spelled
    if _is_listed(sweep):
        typed = shlex.quote(f"{key}={quoted(shown, Quote.double)}")
        remedy = f"Quote a value that contains commas: {typed}; a list has brackets: {key}=[a,b]"
    raise ConfigError(key, shown, "cannot be searched", remedy)


def _list_keys() -> list[str]:
    """Return the dotted keys of the settings that are lists."""
    defaults = OmegaConf.structured(SweepConfig)
    keys = [key for key in known_keys() if not key.startswith("space")]
    return [key for key in keys if OmegaConf.is_list(OmegaConf.select(defaults, key))]


def _check_choice(text: str, group: str, choice: object) -> None:
    """Raise InputError unless this is a choice of the group, and only one, except for `space`."""
    if not isinstance(choice, str | list):
        raise InputError(f"{text}: is not a choice of the group {group}. Leave the group out with ~{group}.")
    if isinstance(choice, list) and len(choice) > 1 and not group.startswith("space"):
        raise InputError(f"{text}: has {len(choice)} choices, and only the last would count. Give one.")


def _compose(config_name: str, overrides: Sequence[str], more: Path | None) -> DictConfig:
    """Return the settings as Hydra composes them. Raises InputError for a key that the schema lacks."""
    first, others = _search_path(config_name, more)
    texts = [as_override(text) for text in overrides]
    texts += [f"hydra.searchpath=[{quoted(f'file://{folder}')}]" for folder in others]
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
        raise InputError(f"-cn {config_name}: is not a sweep: it lacks `schema`. {BEGIN}.")
    plain = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(plain, dict)
    _remember(plain)
    strange = sorted({*leaves(plain)} - {*known_keys()})
    if strange:
        raise InputError(_place(f"{strange[0]}:", config_name, more) + unknown(strange[0]))
    return composed


def _search_path(config_name: str, more: Path | None) -> tuple[Path, list[Path]]:
    """Return the folder that has the sweep, and the other folders to search for groups."""
    if more is None:
        return SWEEPS, []
    if not (os.path.isdir(more) and os.access(more, os.R_OK | os.X_OK)):
        raise InputError(
            f"-cd {more}: no such folder, or no permission to read it. Give the folder of your sweeps."
        )
    own = _own_file(config_name, more)
    assert own is not None
    check_groups(more, CONF)
    if os.path.lexists(own):
        check_sweep_file(own, _list_keys())
        return more.resolve(), [SWEEPS]  # Hydra searches only the first folder for the primary config
    other = own.with_suffix(".yml")
    if config_name.endswith(".yml") or other.is_file():
        raise InputError(
            f"-cn {config_name}: a sweep's file ends in .yaml. Rename {other.name} to {own.name}."
        )
    return SWEEPS, [more.resolve()]


@contextmanager
def _explained(config_name: str, more: Path | None) -> Iterator[None]:
    """Turn every exception of Hydra and OmegaConf into an InputError."""
    try:
        yield
    except LoraSearchError:
        raise
    except RecursionError:
        loop = "something refers to itself: defaults that lead back, or ${...} that do"
        raise InputError(f"-cn {config_name}: cannot be composed, {loop}. Break the loop.") from None
    except yaml.YAMLError as error:
        raise InputError(redact(explain_yaml(error, config_name))) from None
    except Exception as error:  # noqa: BLE001 (Hydra raises any kind of exception for odd files)
        said = explain(error, config_name, [path.stem for path in _files(SWEEPS, more, "*.yaml")])
        raise InputError(redact(f"{_place(said, config_name, more)}{said}")) from None


def _own_file(config_name: str, more: Path | None) -> Path | None:
    name = config_name.removesuffix(".yaml").removesuffix(".yml")
    return None if more is None else more.resolve() / f"{name}.yaml"


def _place(said: str, config_name: str, more: Path | None) -> str:
    """Return file and line of the key that a message begins with, if the user's sweep file has it."""
    own = _own_file(config_name, more)
    line = None if own is None or not own.is_file() else line_of(own, said.partition(":")[0])
    return "" if line is None else f"{own}, line {line}: "


def _files(ours: Path, more: Path | None, pattern: str) -> list[Path]:
    return sorted(ours.glob(pattern)) + (sorted(more.glob(pattern)) if more is not None else [])


def _question(sweep: Path) -> str:
    """Return the comment on a sweep's first line, or why the file cannot be read."""
    try:
        first = read_text(sweep).partition("\n")[0]
    except InputError as error:
        return f"({str(error).removeprefix(f'{sweep}').lstrip(': ,')})"
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _remember(node: object) -> None:
    """Register the passwords and keys in the settings, so that `redact` removes them from messages."""
    if isinstance(node, str):
        if "${" not in node:  # registered once it is resolved
            remember(node)
    elif isinstance(node, Mapping | list):
        for child in node.values() if isinstance(node, Mapping) else node:
            _remember(child)
