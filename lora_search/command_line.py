"""Shared by the commands: the arguments that name a study, and the exit code.

Every command except `sweep` is `run(command, parser)`; a user sees one message and no traceback. Imports no
torch.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_search.errors import ConfigError, InputError, LoraSearchError
from lora_search.output.streams import exit_code, guarded_streams
from lora_search.output.terminal import Progress
from lora_search.results.record import StudyRecord
from lora_search.settings.composition import DEFAULT_SWEEP, compose_section, compose_study
from lora_search.settings.explanations import known_keys
from lora_search.settings.recorded import recorded_config
from lora_search.settings.schema import StudyConfig, SweepConfig, require
from lora_search.settings.secrets import remember_all
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow
from lora_search.worker.interrupts import EXIT_CODE

TAKEN = r"study\.|runs_dir$|engine\.|artifacts\."  # the settings that a command on a study takes
NOT_NEAR = "to", "top"  # which is confirm.top


@dataclass(frozen=True)
class FoundStudy:
    """A study's database and folder. Neither need exist."""

    config: StudyConfig
    runs_dir: Path

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.config.name


def study_parser(command: str, description: str, *, is_sweep: bool = False) -> argparse.ArgumentParser:
    """Return a parser for a command on a study: study.name=NAME, and study.storage=URL unless it is the
    default; or, with ``is_sweep``, on the settings of a sweep. The command may add its own options."""
    parser = argparse.ArgumentParser(
        prog=f"lora-search {command}", description=description, allow_abbrev=False
    )
    whose = "" if is_sweep else " whose study.name and study.storage are the defaults"
    named = "study.name=NAME; study.storage=URL and runs_dir=FOLDER unless they are the default"
    which = "settings and groups, as for `lora-search sweep`" if is_sweep else named
    parser.add_argument("-cn", "--config-name", dest="sweep", default=DEFAULT_SWEEP, metavar="SWEEP",
                        help=f"the sweep{whose} (default: %(default)s)")  # fmt: skip
    parser.add_argument("-cd", "--config-dir", type=Path, metavar="DIR", help="a folder of your own sweeps")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=which)
    return parser


def find_study(arguments: argparse.Namespace) -> FoundStudy:
    """Return the study that a command line names. Raises InputError for a setting that no command on a study
    takes: it would be ignored."""
    sections = {key.partition(".")[0] for key in known_keys()}
    for key in (text.partition("=")[0] for text in arguments.overrides):
        if key.lstrip("+").partition(".")[0] in sections and not re.match(TAKEN, key.lstrip("+")):
            raise InputError(
                f"{key}: the study has recorded its own, which counts. Leave it out: only study.*, runs_dir, "
                "engine.* and artifacts.* are taken, key by key (engine.device=cpu)."
            )
    study, runs_dir = compose_study(arguments.sweep, arguments.overrides, arguments.config_dir)
    return FoundStudy(study, Path(runs_dir))


@dataclass(frozen=True)
class OpenStudy:
    """A study that exists, with the settings that it recorded and what it has so far."""

    view: StudyView
    config: SweepConfig
    record: StudyRecord


def open_study(arguments: argparse.Namespace) -> OpenStudy:
    """Return the study that a command line names. Raises as `find_study` does,
    and ConfigError if it does not exist."""
    found = find_study(arguments)
    view = StudyView(found.config)
    record = StudyRecord(view.rows(), view.attributes(), found.folder)
    return OpenStudy(view, _recorded(arguments, found, record.attributes), record)


def take(arguments: argparse.Namespace, known: Mapping[str, str]) -> dict[str, str]:
    """Return the command's own keys, given or at their defaults; remove them from the overrides. Raises
    InputError for a key that is nearly one of them."""
    typed = [text.partition("=") for text in arguments.overrides]
    for key in (key for key, equals, _ in typed if equals and key not in known and not re.match(TAKEN, key)):
        near = [own for own in known if own.endswith(f".{key}")]
        near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
        if near and (near[0], key) != NOT_NEAR:
            raise InputError(f"{key}: this command has no such key. Did you mean {near[0]}?")
    given = {key: value for key, equals, value in typed if equals and key in known}
    arguments.overrides = [text for text in arguments.overrides if text.partition("=")[0] not in given]
    return {**known, **given}


def chosen_trial(key: str, text: str, record: StudyRecord) -> TrialRow:
    """Return the trial with that number, or the best if the text is empty. Raises ConfigError."""
    if not text:
        if record.best is None:
            raise ConfigError(key, "none", "no trial is complete yet", "Run the sweep first.")
        return record.best
    measured = {str(row.number): row for row in record.rows if row.perplexity is not None}
    there_are = f"There are: {', '.join(measured)}."
    require(text in measured, key, text, "must be a trial that has a perplexity", there_are)
    return measured[text]


def whole_number(key: str, text: str) -> int:
    """Return the number that a key of a command's own was given. Raises ConfigError."""
    require(text.isdigit() and int(text) >= 1, key, text, "must be a whole number >= 1")
    return int(text)


def _recorded(arguments: argparse.Namespace, found: FoundStudy, attributes: Mapping[str, str]) -> SweepConfig:
    """Return the settings that the study recorded, with `engine` and `artifacts` keys of the command line."""
    config = recorded_config(attributes, found.config)
    typed = [key.partition("=")[0] for key in arguments.overrides]
    sections = {key.partition(".")[0] for key in typed}
    for section in sections & {"engine", "artifacts"}:
        given = compose_section(arguments.sweep, arguments.overrides, arguments.config_dir, section)
        names = [key.partition(".")[2] for key in typed if key.startswith(f"{section}.")]
        values = {name: getattr(given, name) for name in names}
        setattr(config, section, replace(getattr(config, section), **values))
    return config


def run(command: Callable[[argparse.Namespace, Progress], None], parser: argparse.ArgumentParser) -> int:
    """Run the command on this process's arguments; return the exit code."""
    with guarded_streams() as out:
        remember_all(sys.argv[1:], os.environ)
        return exit_code(_answer(command, parser, Progress()), out)


def _answer(
    command: Callable[[argparse.Namespace, Progress], None],
    parser: argparse.ArgumentParser,
    progress: Progress,
) -> int:
    try:
        command(parser.parse_intermixed_args(sys.argv[1:]), progress)
    except LoraSearchError as error:
        progress.refuse(error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_CODE
    return 0
