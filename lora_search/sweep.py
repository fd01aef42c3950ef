"""`python -m lora_search.sweep -cn NAME key=value ...`: one search, from settings to the best adapter.

Exit codes: 0 done, 1 the sweep failed, 2 wrong input, 130 interrupted (the same command goes on).
"""

import fcntl
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra._internal.utils import get_args_parser

from lora_search.composition import DEFAULT_SWEEP, SWEEPS, as_space_override, compose
from lora_search.config import SweepConfig, as_dict, redact
from lora_search.errors import InputError, LoraSearchError
from lora_search.launcher import Command, run_workers, told_to_launcher, typed_arguments
from lora_search.progress import Progress, leaderboard, next_steps
from lora_search.trial import TrialRow

if TYPE_CHECKING:
    from lora_search.data import Splits

FINISHED = ("COMPLETE", "PRUNED")
LIBRARIES = ("torch", "transformers", "peft", "optuna", "hydra-core", "datasets", "wandb", "sqlalchemy")


def main() -> int:
    """Run the sweep that the command line names; return the exit code."""
    progress = Progress()
    arguments = get_args_parser().parse_args()
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
        signal.signal(signal.SIGTERM, _interrupt)
        if config.launcher.name == "local" and config.launcher.worker is None:
            own_folder = None if config_dir == SWEEPS else config_dir
            command = Command(sweep=name, config_dir=own_folder, overrides=tuple(arguments.overrides))
            run_together(config, command, progress)
        else:
            with told_to_launcher(config):
                run_sweep(config, name, progress)
    except LoraSearchError as error:
        progress.console.print(str(error), markup=False, style="red")
        return error.exit_code
    except KeyboardInterrupt:
        progress.event("interrupted: nothing is lost, the same command goes on")
        return 130
    return 0


def run_together(config: SweepConfig, command: Command, progress: Progress) -> None:
    """Let workers search, and conclude once. Imports no torch."""
    from lora_search.space import parse_space
    from lora_search.study import SweepStudy, check_study

    check_study(config, parse_space(config))
    run_workers(config, command, progress)
    conclude(*SweepStudy.read(config.study), config, progress)


def run_sweep(config: SweepConfig, sweep_name: str, progress: Progress) -> None:
    """Prepare, search, conclude. One of many workers leaves the conclusion to its launcher."""
    from lora_search.data import prepare
    from lora_search.engine import Room, build_engine
    from lora_search.model import load_base, load_tokenizer, pick_device, resolve_model
    from lora_search.reading import load_rows
    from lora_search.space import parse_space
    from lora_search.study import SweepStudy, check_study
    from lora_search.tracking import make_tracker
    from lora_search.worker import work

    folder = Path(config.runs_dir) / config.study.name
    space = parse_space(config)
    check_study(config, space)
    pick_device(config.engine.device)
    tracker = make_tracker(config, {"model": config.model.path, "seed": config.seed})
    rows = load_rows(config.data)
    progress.event(f"base model {config.model.path}: reading")
    source = resolve_model(config.model)
    splits = prepare(config, rows, load_tokenizer(source, config.model), folder / "data")
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
        with progress:
            work(study, engine, tracker, progress)
    if config.launcher.worker is None:
        conclude(study.rows(), study.attributes(), config, progress)


def conclude(
    rows: Sequence[TrialRow], attributes: Mapping[str, str], config: SweepConfig, progress: Progress
) -> None:
    """Show the leaderboard, write report and best adapter, and say what to type next."""
    from lora_search.export import export_best
    from lora_search.report import write_report

    folder = Path(config.runs_dir) / config.study.name
    base_perplexity = float(attributes["base_perplexity"])
    with one_at_a_time(folder):
        best = export_best(rows, attributes, folder)
        write_report(rows, attributes, base_perplexity, folder / "report.html")
    progress.console.print(leaderboard(rows, base_perplexity))
    if "exhausted" in attributes and sum(r.state in FINISHED for r in rows) < config.study.n_trials:
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


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other invocations on the same study: they often come to its end at the same moment."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint(config: SweepConfig, splits: "Splits", dtype: str) -> dict[str, str]:
    """Return what must stay the same under one study name; the dtype that `auto` came to."""
    settings = as_dict(config)
    free = ("study", "engine", "tracker", "launcher", "runs_dir")
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
    """Return what the study should remember of how it was run; no secrets. All workers say the same."""
    shared = replace(config, launcher=replace(config.launcher, worker=None))
    return {
        "study": config.study.name,
        "sweep": sweep_name,
        "command": redact(shlex.join(["python", "-m", "lora_search.sweep", *typed_arguments(sys.argv[1:])])),
        "base_model": source,
        "base_model_name": config.model.path,
        "max_length": str(splits.max_length),
        "git_commit": _git_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        **_flat("data", splits.counts),
        **{f"setting/{k}": v for k, v in _flat("sweep", as_dict(shared)).items()},
        **{f"version/{name}": version(name) for name in LIBRARIES},
    }


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


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
    hydra.main(version_base="1.3", config_path=str(SWEEPS), config_name=DEFAULT_SWEEP)(_ignore)()
    return 0


def _ignore(_: object) -> None:
    """Hydra never gets as far as running a job."""


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
