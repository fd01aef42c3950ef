"""`python -m lora_search.sweep -cn NAME key=value ...`: one search, from settings to the best adapter.

Exit codes: 0 done, 1 the sweep failed, 2 wrong input, 130 interrupted (the same command goes on).
"""

import io
import sys
from argparse import Namespace
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.worker.interrupts import EXIT_CODE, Interrupts

if __name__ == "__main__":  # the imports below take half a second, and torch some more
    interrupts = Interrupts().listen()

# isort: split

import hydra
from hydra._internal.utils import get_args_parser

from lora_search.errors import ConfigError, InputError, LoraSearchError
from lora_search.files.atomic import explained_writing
from lora_search.output.terminal import Progress
from lora_search.settings.composition import DEFAULT_SWEEP, SWEEPS, as_override, compose, help_page
from lora_search.settings.schema import SweepConfig, redact
from lora_search.worker.launcher import Command, run_workers, told_to_launcher

if TYPE_CHECKING:
    from lora_search.engine.engine import Engine
    from lora_search.settings.space import Space
    from lora_search.study.study import SweepStudy

INFORMING = (
    "hydra_help", "version", "show_config", "cfg", "info", "shell_completion", "show_overrides",
)  # fmt: skip


def main(interrupts: Interrupts | None = None) -> int:
    """Run the sweep that the command line names; return the exit code."""
    progress, interrupts = Progress(), interrupts or Interrupts()
    arguments = _read_arguments()
    try:
        _refuse_unsupported(arguments)
        if arguments.help:
            page = help_page(_name(arguments), arguments.overrides, _folder(arguments))
            progress.console.print(page, markup=False, soft_wrap=True)
        elif any(getattr(arguments, flag, None) for flag in INFORMING):
            _inform()
        else:
            _run(arguments, progress, interrupts)
    except LoraSearchError as error:
        progress.console.print(redact(str(error)), markup=False, style="red", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        progress.event("interrupted: nothing is lost, the same command goes on")
        return EXIT_CODE
    return 0


def run_together(config: SweepConfig, command: Command, progress: Progress, interrupts: Interrupts) -> None:
    """Let workers search, and conclude once. Imports no torch."""
    from lora_search.output.conclusion import conclude
    from lora_search.settings.space import parse_space
    from lora_search.study.reclaiming import reclaim_all
    from lora_search.study.study import SweepStudy, check_study

    check_study(config, parse_space(config))
    study_folder(config)
    try:
        with interrupts.after_the_pass():
            run_workers(config, command, progress, interrupts.check)
    except KeyboardInterrupt:
        reclaim_all(config.study)  # what a worker held that was killed before the interrupt
        raise
    conclude(*SweepStudy.read(config.study), config, progress)


def run_sweep(config: SweepConfig, sweep_name: str, progress: Progress, interrupts: Interrupts) -> None:
    """Prepare, search, conclude. One of many workers leaves the conclusion to its launcher."""
    from lora_search.database.outbox import Outbox
    from lora_search.output.conclusion import conclude
    from lora_search.output.tracking import make_tracker
    from lora_search.prepare import describe_search
    from lora_search.settings.space import parse_space
    from lora_search.study.study import check_study
    from lora_search.worker.worker import work

    space = parse_space(config)
    check_study(config, space)
    about = {"model": config.model.path, "data": config.data.path, "seed": config.seed}
    with closing(make_tracker(config, about)) as tracker:
        for line in describe_search(config, space):
            progress.event(line)
        engine, study = prepare_sweep(config, sweep_name, space, progress)
        if not study.is_finished:
            with progress, interrupts.after_the_pass():
                work(study, engine, tracker, progress, interrupts.check)
    if config.launcher.worker is None:
        found = Outbox(config.study).insist(lambda: (study.rows(), study.attributes()))
        conclude(*found, config, progress)


def prepare_sweep(
    config: SweepConfig, sweep_name: str, space: "Space", progress: Progress
) -> "tuple[Engine, SweepStudy]":
    """Return engine and study, ready to search: data read and split, base loaded and measured."""
    from lora_search.data.preparation import prepare, write_pairs
    from lora_search.data.reading import load_rows
    from lora_search.engine.build import Room, build_engine
    from lora_search.model.loading import load_base, load_tokenizer, pick_device, resolve_model
    from lora_search.output.dashboard_note import write_note
    from lora_search.prepare import check_amount, check_places, describe_rows
    from lora_search.study.about import attributes, fingerprint
    from lora_search.study.study import SweepStudy

    pick_device(config.engine.device)
    rows = load_rows(config.data)
    check_places(config)
    progress.event(f"base model {config.model.path}: reading")
    source = resolve_model(config.model)
    splits = prepare(config, rows, load_tokenizer(source, config.model))
    for line in describe_rows(config, splits):
        progress.event(line)
    check_amount(config, space, len(splits.train))
    base = load_base(source, config.model, config.engine)
    engine, sizes = build_engine(config, Room.of_space(config, space), base, splits)
    if sizes:
        progress.event(f"engine: {sizes}")
    folder, known = study_folder(config), attributes(config, sweep_name, source, splits)
    print_of_it = fingerprint(config, splits, str(base.dtype).removeprefix("torch."))
    study = SweepStudy.open(config, space, print_of_it, known, folder)
    with explained_writing(folder):
        write_pairs(splits, folder / "data")  # now that no other sweep's lie there
    for change in study.widened:
        progress.event(f"study {config.study.name}: widened {change}")
    progress.event(f"study {config.study.name}: {study.standing}")
    is_new = "base_perplexity" not in study.attributes()
    perplexity = float(study.remember("base_perplexity", lambda: repr(engine.evaluate_base())))
    progress.event(f"base model on {base.device}, {base.dtype}: validation perplexity {perplexity:.3f}")
    if is_new:
        write_note(study.study, config, space, known["command"], perplexity)
    return engine, study


def study_folder(config: SweepConfig) -> Path:
    """Return where the sweep writes, made where it is missing. Raises ConfigError where that is not inside
    runs_dir."""
    runs = Path(config.runs_dir)
    folder = runs / config.study.name
    rule, remedy = f"must be a folder inside {runs}", "Choose another study.name."
    if folder.resolve().parent != runs.resolve() or (folder.exists() and not folder.is_dir()):
        leads = f"{rule}, and {folder} leads to {folder.resolve()}"
        raise ConfigError("study.name", config.study.name, leads, remedy)
    with explained_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_unsupported(arguments: Namespace) -> None:
    if arguments.multirun:
        raise InputError(
            "-m: a sweep searches by its `space`, not by multirun. Leave -m out: optim.lr=interval(1e-5,1e-3)"
        )
    if arguments.config_path:
        raise InputError("-cp: sweeps lie in sweeps/. Add a folder of your own with -cd.")


def _name(arguments: Namespace) -> str:
    return arguments.config_name or DEFAULT_SWEEP


def _folder(arguments: Namespace) -> Path | None:
    return Path(arguments.config_dir) if arguments.config_dir else None


def _run(arguments: Namespace, progress: Progress, interrupts: Interrupts) -> None:
    name, folder = _name(arguments), _folder(arguments)
    config = compose(name, arguments.overrides, folder)
    if config.launcher.name == "local" and config.launcher.worker is None:
        command = Command(
            sweep=name, config_dir=folder and folder.resolve(), overrides=tuple(arguments.overrides)
        )
        run_together(config, command, progress, interrupts)
        return
    with told_to_launcher(config):
        run_sweep(config, name, progress, interrupts)


def _read_arguments() -> Namespace:
    """Return what the command line says; what argparse says of it comes without a password."""
    said, parser = io.StringIO(), get_args_parser()
    try:
        with redirect_stderr(said):
            arguments: Namespace = parser.parse_args()
    finally:
        sys.stderr.write(redact(said.getvalue()))
    return arguments


def _inform() -> None:
    """Let Hydra answer --cfg, --info and the like, passwords left out."""
    sys.argv[1:] = [as_override(a) if "=" in a and not a.startswith("-") else a for a in sys.argv[1:]]
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            hydra.main(version_base="1.3", config_path=str(SWEEPS), config_name=DEFAULT_SWEEP)(_ignore)()
    finally:
        sys.stdout.write("".join(redact(line) for line in said.getvalue().splitlines(keepends=True)))


def _ignore(_: object) -> None:
    """Hydra never gets as far as running a job."""


if __name__ == "__main__":
    interrupts.leave(main(interrupts))
