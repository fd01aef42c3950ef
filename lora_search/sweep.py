"""`python -m lora_search.sweep -cn NAME key=value ...`: one search, from settings to the best adapter.

Exit codes: 0 done, 1 the sweep failed, 2 wrong input, 130 interrupted (the same command resumes).
"""

import io
import os
import sys
from argparse import Namespace
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path

from lora_search.output.streams import greet
from lora_search.worker.interrupts import EXIT_CODE, Interrupts

if __name__ == "__main__":  # the imports below take half a second, torch even longer
    interrupts = Interrupts().listen()
    greet("sweep")

# isort: split

import hydra
from hydra._internal.utils import get_args_parser

from lora_search.errors import InputError, LoraSearchError
from lora_search.output.streams import clean, exit_code, guarded_streams
from lora_search.output.terminal import Progress
from lora_search.settings.composition import (
    DEFAULT_SWEEP,
    SWEEPS,
    as_override,
    check_composes,
    compose,
    help_page,
)
from lora_search.settings.schema import SweepConfig
from lora_search.settings.secrets import redact, remember_all
from lora_search.trial import TrialRow
from lora_search.worker.command import Command, received, typed_command
from lora_search.worker.launcher import leaving_no_folder, run_workers
from lora_search.worker.team import told_to_launcher

INFORMING = (
    "help", "hydra_help", "version", "show_config", "cfg", "info", "shell_completion", "show_overrides",
)  # fmt: skip


def main(interrupts: Interrupts | None = None) -> int:
    """Run the sweep that the command line names; return the exit code."""
    with guarded_streams() as out:
        remember_all([*received().overrides, *sys.argv[1:]], os.environ)
        arguments = get_args_parser().parse_intermixed_args()  # options may come between the settings
        code = _answer(arguments, Progress(), interrupts or Interrupts())
        return exit_code(code, out) if _only_informs(arguments) else code  # a sweep's output may be lost


def _answer(arguments: Namespace, progress: Progress, interrupts: Interrupts) -> int:
    try:
        _refuse_unsupported(arguments)
        if arguments.help:
            page = help_page(_name(arguments), arguments.overrides, _folder(arguments))
            progress.console.print(page, markup=False, soft_wrap=True)
        elif _only_informs(arguments):
            _inform(arguments)
        else:
            _run(arguments, progress, interrupts)
    except LoraSearchError as error:
        progress.refuse(error)
        return error.exit_code
    except KeyboardInterrupt:
        progress.event("interrupted: nothing is lost; run the same command to continue")
        return EXIT_CODE
    return 0


def _run(arguments: Namespace, progress: Progress, interrupts: Interrupts) -> None:
    name, folder = _name(arguments), _folder(arguments)
    overrides = [*received().overrides, *arguments.overrides]
    config = compose(name, overrides, folder)
    progress.event(f"sweep {name}: study {config.study.name} in {Path(config.runs_dir) / config.study.name}")
    if config.launcher.name != "inline" and config.launcher.worker is None:
        command = Command(
            sweep=name,
            config_dir=str(folder.resolve()) if folder else None,
            overrides=tuple(overrides),
            typed=typed_command(sys.argv),
        )
        run_together(config, command, progress, interrupts)
        return
    with told_to_launcher(config.launcher.worker is not None):
        run_sweep(config, name, progress, interrupts)


def run_sweep(config: SweepConfig, sweep_name: str, progress: Progress, interrupts: Interrupts) -> None:
    """Prepare, search, conclude, also if the search ends early. A launcher's worker leaves the conclusion to
    the launcher."""
    from lora_search.ops.device import peak_bytes
    from lora_search.output.conclusion import conclude_so_far
    from lora_search.output.tracking import facts_of_sweep, make_tracker
    from lora_search.output.tracking_study import tracked_facts
    from lora_search.prepare import describe_search, prepare_sweep
    from lora_search.results.ranking import base_of
    from lora_search.service.afterwards import score_and_share
    from lora_search.service.answer_metrics import check_metric
    from lora_search.service.export_check import check_best_export
    from lora_search.settings.space import parse_space
    from lora_search.study.opening_checks import check_study
    from lora_search.study.study import SweepStudy
    from lora_search.worker.worker import work

    space = parse_space(config)
    check_study(config, space)
    check_metric(config.metric)
    is_alone = config.launcher.worker is None
    progress.searched = list(space.expressions)
    with closing(make_tracker(config, facts_of_sweep(config))) as tracker:
        progress.events(describe_search(config, space))
        engine, study = prepare_sweep(config, sweep_name, space, progress)
        known = study.attributes()
        tracker.begin(base_of(known), tracked_facts(known))
        try:
            with closing(engine):
                with interrupts.after_the_pass():
                    if not study.is_finished:
                        with progress:
                            work(study, engine, tracker, progress, interrupts.check)
                        study.note_peak(peak_bytes(engine.model.devices))
                    if study.is_finished:
                        rows, folder = study.rows(), study.folder
                        score_and_share(config, rows, folder, engine, progress, interrupts.check)
                if study.is_finished and config.launcher.worker in (None, 0):
                    progress.events(check_best_export(engine, config.study, study.folder))
        except (KeyboardInterrupt, LoraSearchError):
            if is_alone:
                conclude_so_far(lambda: SweepStudy.read(config.study), config, progress)
            raise
    if is_alone:
        _finish_alone(config, progress)


def _finish_alone(config: SweepConfig, progress: Progress) -> None:
    """Read what was searched, for as long as it takes, and finish. Optuna keeps ended trials as they were
    before their answers were scored."""
    from lora_search.database.outbox import Outbox
    from lora_search.study.study import SweepStudy

    _finish(Outbox(config.study).insist(lambda: SweepStudy.read(config.study)), config, progress)


def run_together(config: SweepConfig, command: Command, progress: Progress, interrupts: Interrupts) -> None:
    """Run worker processes, then conclude once. Imports no torch."""
    from lora_search.output.conclusion import conclude_so_far
    from lora_search.service.answer_metrics import check_metric
    from lora_search.settings.space import parse_space
    from lora_search.study.claims import reclaim_all
    from lora_search.study.folder import check_folder, find_owned, study_folder
    from lora_search.study.opening_checks import check_adoptable, check_study
    from lora_search.study.study import SweepStudy

    check_study(config, parse_space(config))
    check_metric(config.metric)
    folder = Path(config.runs_dir) / config.study.name
    check_folder(config.study, folder.parent)
    check_adoptable(config.study)
    find_owned(config.study, folder)
    try:
        with leaving_no_folder(folder), interrupts.after_the_pass():
            study_folder(config)
            run_workers(config, command, progress, interrupts.check)
    except KeyboardInterrupt:
        reclaim_all(config.study)  # the trials of workers that were killed before the interrupt
        conclude_so_far(lambda: SweepStudy.read(config.study), config, progress)
        raise
    _finish(SweepStudy.read(config.study), config, progress)


def _finish(found: tuple[list[TrialRow], dict[str, str]], config: SweepConfig, progress: Progress) -> None:
    """Show the answer, and note it in the dashboard and in W&B. Imports no torch."""
    from lora_search.output.conclusion import conclude
    from lora_search.output.dashboard_note import note_result
    from lora_search.output.tracking_study import track_study
    from lora_search.results.record import StudyRecord

    record = StudyRecord(*found, Path(config.runs_dir) / config.study.name)
    conclude(record, config, progress)
    note_result(config.study, record)
    track_study(config, record)


def _refuse_unsupported(arguments: Namespace) -> None:
    if arguments.multirun:
        raise InputError(
            "-m: a sweep searches by its `space`, not by multirun. Leave -m out: optim.lr=interval(1e-5,1e-3)"
        )
    if arguments.config_path:
        raise InputError("-cp: is not supported; sweeps are in sweeps/. Add your own folder with -cd.")
    for flag, value in (("-cn", arguments.config_name), ("-cd", arguments.config_dir)):
        if value is not None and not value.strip():
            raise InputError(
                f"{flag}: must not be empty, got {value!r}. Leave it out, or check the variable in it."
            )
    if arguments.experimental_rerun:
        raise InputError("--experimental-rerun: is not for sweeps. The same command continues a study.")
    if arguments.package and not _only_informs(arguments):
        raise InputError("--package: works only with --cfg. Leave it out.")


def _only_informs(arguments: Namespace) -> bool:
    return any(getattr(arguments, flag, None) for flag in INFORMING)


def _inform(arguments: Namespace) -> None:
    """Run Hydra's own --cfg, --info and the like. Raises InputError for settings that cannot be composed."""
    check_composes(_name(arguments), arguments.overrides, _folder(arguments), resolve=arguments.resolve)
    options = [text for text in sys.argv[1:] if text not in arguments.overrides]
    sys.argv[1:] = [*map(as_override, arguments.overrides), *options]
    said, faults = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(faults):
            hydra.main(version_base="1.3", config_path=str(SWEEPS), config_name=DEFAULT_SWEEP)(_ignore)()
    except SystemExit as end:
        if end.code:
            lines = [
                line for line in faults.getvalue().splitlines() if line and "HYDRA_FULL_ERROR" not in line
            ]
            raise InputError(f"The settings cannot be shown: {(lines or ['no cause given'])[-1]}") from None
    finally:
        sys.stdout.write("".join(clean(redact(line)) for line in said.getvalue().splitlines(keepends=True)))


def _ignore(_: object) -> None:
    """A job for Hydra, which it never runs."""


def _name(arguments: Namespace) -> str:
    return arguments.config_name or DEFAULT_SWEEP


def _folder(arguments: Namespace) -> Path | None:
    return Path(arguments.config_dir) if arguments.config_dir else None


if __name__ == "__main__":
    interrupts.leave(main(interrupts))
