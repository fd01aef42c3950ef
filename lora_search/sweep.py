"""`python -m lora_search.sweep -cn NAME key=value ...`: one search, from settings to the best adapter.

Exit codes: 0 done, 1 the sweep failed, 2 wrong input, 130 interrupted (the same command goes on).
"""

import argparse
import io
import os
import platform
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.interrupts import EXIT_CODE, Interrupts

if __name__ == "__main__":  # the imports below take half a second, and torch some more
    interrupts = Interrupts().listen()

# isort: split

import hydra
from hydra._internal.utils import get_args_parser

from lora_search.composition import DEFAULT_SWEEP, SWEEPS, as_space_override, compose
from lora_search.config import SweepConfig, as_dict, redact
from lora_search.errors import ConfigError, InputError, LoraSearchError
from lora_search.files import explained_writing
from lora_search.progress import Progress, leaderboard, next_steps

if TYPE_CHECKING:
    from lora_search.data import Splits
    from lora_search.study import SweepStudy

LIBRARIES = ("torch", "transformers", "peft", "optuna", "hydra-core", "datasets", "wandb", "sqlalchemy")


def main(interrupts: Interrupts | None = None) -> int:
    """Run the sweep that the command line names; return the exit code."""
    progress, interrupts = Progress(), interrupts or Interrupts()
    arguments = _read_arguments()
    try:
        if arguments.multirun:
            raise InputError(
                "-m: a sweep searches by its `space`, not by multirun. Leave -m out: "
                "optim.lr=interval(1e-5,1e-3)"
            )
        config_dir = Path(arguments.config_dir).resolve() if arguments.config_dir else SWEEPS
        name = arguments.config_name or DEFAULT_SWEEP
        if _only_informs(arguments):
            return _inform()
        config = compose(name, arguments.overrides, config_dir)
        run_sweep(config, name, progress, interrupts)
    except LoraSearchError as error:
        progress.console.print(redact(str(error)), markup=False, style="red")
        return error.exit_code
    except KeyboardInterrupt:
        progress.event("interrupted: nothing is lost, the same command goes on")
        return EXIT_CODE
    return 0


def run_sweep(config: SweepConfig, sweep_name: str, progress: Progress, interrupts: Interrupts) -> None:
    """Prepare, search, conclude."""
    from lora_search.data import prepare
    from lora_search.engine import Room, build_engine
    from lora_search.model import load_base, load_tokenizer, pick_device, resolve_model
    from lora_search.reading import load_rows
    from lora_search.space import parse_space
    from lora_search.study import SweepStudy, check_study
    from lora_search.tracking import make_tracker
    from lora_search.worker import work

    folder = study_folder(config)
    space = parse_space(config)
    check_study(config, space)
    pick_device(config.engine.device)
    tracker = make_tracker(config, {"model": config.model.path, "seed": config.seed})
    rows = load_rows(config.data)
    progress.event(f"base model {config.model.path}: reading")
    source = resolve_model(config.model)
    tokenizer = load_tokenizer(source, config.model)
    with explained_writing(folder):
        splits = prepare(config, rows, tokenizer, folder / "data")
    progress.event(f"data {config.data.path}: " + ", ".join(f"{v} {k}" for k, v in splits.counts.items()))
    base = load_base(source, config.model, config.engine)
    engine, sizes = build_engine(config, Room.of_space(config, space), base, splits)
    if sizes:
        progress.event(f"engine: {sizes}")
    attributes = _attributes(config, sweep_name, source, splits)
    fingerprint = _fingerprint(config, splits, str(base.dtype).removeprefix("torch."))
    study = SweepStudy.open(config, space, fingerprint, attributes, folder)
    progress.event(
        f"study {config.study.name}: {study.summary().finished} of {config.study.n_trials} trials done"
    )
    base_perplexity = study.remember("base_perplexity", lambda: repr(engine.evaluate_base()))
    progress.event(
        f"base model on {base.device}, {base.dtype}: validation perplexity {float(base_perplexity):.3f}"
    )
    if not study.is_finished:
        with progress, interrupts.after_the_pass():
            work(study, engine, tracker, progress, interrupts.check)
    _conclude(study, folder, config, progress)


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


def _conclude(study: "SweepStudy", folder: Path, config: SweepConfig, progress: Progress) -> None:
    """Show the leaderboard, write report and best adapter, and say what to type next."""
    from lora_search.export import export_best
    from lora_search.outbox import Outbox
    from lora_search.report import write_report

    rows, attributes = Outbox(config.study).insist(lambda: (study.rows(), study.attributes()))
    base_perplexity = float(attributes["base_perplexity"])
    with explained_writing(folder):
        best = export_best(rows, attributes, folder)
        write_report(rows, attributes, base_perplexity, folder / "report.html")
    progress.console.print(leaderboard(rows, base_perplexity))
    if study.exhausted:
        progress.event(
            "the space is exhausted: every combination has been tried, so fewer trials than n_trials ran"
        )
    progress.console.print("Next:")
    places = {
        "report": str(folder / "report.html"),
        "best adapter": f"{best}/adapter" if best else "none: no trial is complete",
        "dashboard": f"make dashboard   (optuna-dashboard {redact(config.study.storage)})",
        "W&B": f"wandb sync {folder}/trials/*/wandb/offline-run-*",
        "more trials": f"the same command with study.n_trials={config.study.n_trials * 2}",
        "your own data": "make sweep ARGS='data=jsonl data.path=my.jsonl study.name=mine'",
    }
    if config.tracker.name != "wandb_offline":
        del places["W&B"]
    progress.console.print(next_steps(places), markup=False)


def _fingerprint(config: SweepConfig, splits: "Splits", dtype: str) -> dict[str, str]:
    """Return what must stay the same under one study name; the dtype that `auto` came to."""
    settings = as_dict(config)
    free = ("study", "engine", "tracker", "runs_dir")
    flat = {"data_hash": splits.data_hash, "engine.dtype": dtype}
    for section, value in settings.items():
        if section not in free:
            flat |= _flat(section, value)
    return flat


def _flat(prefix: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: str(value)}
    return {
        key: text for name, child in value.items() for key, text in _flat(f"{prefix}.{name}", child).items()
    }


def _attributes(config: SweepConfig, sweep_name: str, source: str, splits: "Splits") -> dict[str, str]:
    """Return what the study should remember of how it was run; no secrets."""
    return {
        "study": config.study.name,
        "sweep": sweep_name,
        "command": redact(shlex.join(["python", "-m", "lora_search.sweep", *sys.argv[1:]])),
        "base_model": source,
        "base_model_name": config.model.path,
        "max_length": str(splits.max_length),
        "git_commit": _git_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        **_flat("data", splits.counts),
        **{f"setting/{k}": v for k, v in _flat("sweep", as_dict(config)).items()},
        **{f"version/{name}": version(name) for name in LIBRARIES},
    }


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


def _read_arguments() -> argparse.Namespace:
    """Return what the command line says; what argparse says of it comes without a password."""
    said, parser = io.StringIO(), get_args_parser()
    try:
        with redirect_stderr(said):
            arguments: argparse.Namespace = parser.parse_args()
    finally:
        sys.stderr.write(redact(said.getvalue()))
    return arguments


def _only_informs(arguments: object) -> bool:
    flags = (
        "help",
        "hydra_help",
        "version",
        "show_config",
        "cfg",
        "info",
        "shell_completion",
        "show_overrides",
    )
    return any(getattr(arguments, flag, None) for flag in flags)


def _inform() -> int:
    """Let Hydra answer --help, --cfg, --info and the like."""
    sys.argv[1:] = [a if a.startswith("-") else as_space_override(a) for a in sys.argv[1:]]
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            hydra.main(version_base="1.3", config_path=str(SWEEPS), config_name=DEFAULT_SWEEP)(_ignore)()
    finally:
        sys.stdout.write("".join(redact(line) for line in said.getvalue().splitlines(keepends=True)))
    return 0


def _ignore(_: object) -> None:
    """Hydra never gets as far as running a job."""


if __name__ == "__main__":
    interrupts.leave(main(interrupts))
