"""Hydra composes a sweep: `sweeps/NAME.yaml` over the groups in `conf/` and the command line, into a
SweepConfig.

A sweep on the command line (`optim.lr=interval(1e-5,1e-3)`, quoted or not) is taken as `space.optim.lr`.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_search.config import SweepConfig, redact
from lora_search.errors import InputError

PACKAGE = Path(__file__).parent
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent  # a wheel carries both folders inside
SWEEPS, CONF = ROOT / "sweeps", ROOT / "conf"
DEFAULT_SWEEP = "construction_faq"


class GroupsPlugin(SearchPathPlugin):  # type: ignore[misc]  # hydra's plugin base is untyped
    """Puts the config groups on the search path, so that `--help` lists them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("lora_search", f"file://{CONF}")


Plugins.instance().register(GroupsPlugin)
ConfigStore.instance().store(name="schema", node=SweepConfig)


def compose(config_name: str, overrides: Sequence[str], config_dir: Path = SWEEPS) -> SweepConfig:
    """Return the checked settings of a sweep. Raises InputError with one message for whatever is wrong."""
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3", job_name="lora_search"):
            composed = hydra_compose(config_name, overrides=[as_space_override(text) for text in overrides])
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(redact(_explain(error, config_name))) from None
    assert isinstance(config, SweepConfig)
    return config


def as_space_override(text: str) -> str:
    """Return the override with a sweep turned into text under `space`; anything else as it is."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return text  # composing reports it
    key = override.key_or_group
    if override.is_sweep_override():
        key = key if key.startswith("space.") else f"space.{key}"
        value = text.partition("=")[2].replace("\\", "\\\\").replace("'", "\\'")
        return f"++{key}='{value}'"
    return f"++{text}" if key.startswith("space.") else text


def _explain(error: Exception, config_name: str) -> str:
    """Return one line that names key, rule and remedy, from Hydra's or OmegaConf's own words."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read: {text.partition(' See ')[0]}. Quote it: 'key=value'."
    missing = _first(r"Could not find '([^']+)'", text)
    if missing:
        available = text[text.find("Available") :].partition(" Config search")[0]
        return f"{missing}: there is no such choice. {available}."
    key = _first(r"full_key: (\S+)", str(cause)) or _first(r"Could not override '([^']+)'", text)
    if "MissingConfig" in type(error).__name__ and config_name in text:
        return (
            f"-cn {config_name}: no such sweep. There are: {', '.join(_sweeps())}; or give a folder with -cd."
        )
    if "is not in struct" in text or "not in '" in str(cause):
        near = difflib.get_close_matches(key or "", known_keys(), n=3, cutoff=0.5)
        return f"{key}: there is no such setting. " + (
            f"Did you mean {', '.join(near)}?" if near else "See --cfg job."
        )
    if "missing mandatory value" in text.casefold():
        return f"{key}: must be given, got ???. Add {key}=VALUE to the command."
    if key:
        return f"{key}: {str(cause).splitlines()[0]}."
    return f"The settings cannot be composed: {text}"


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _sweeps() -> list[str]:
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def known_keys() -> list[str]:
    """Return every setting as its dotted key."""
    keys, stack = [], [("", OmegaConf.structured(SweepConfig))]
    while stack:
        prefix, node = stack.pop()
        for name in node:
            child = None if OmegaConf.is_missing(node, name) else node[name]
            if OmegaConf.is_dict(child):
                stack.append((f"{prefix}{name}.", child))
            else:
                keys.append(f"{prefix}{name}")
    return sorted(keys)
