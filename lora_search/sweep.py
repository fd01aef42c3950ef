"""`python -m lora_search.sweep -cn NAME key=value ...`: one search, from settings to the best adapter.

Exit codes: 0 done, 1 the sweep failed, 2 wrong input, 130 interrupted (the same command goes on).
"""

import os
import platform
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra._internal.utils import get_args_parser

from lora_search.composition import DEFAULT_SWEEP, SWEEPS, as_override, compose, help_page
from lora_search.config import SweepConfig, as_dict, redact
from lora_search.errors import InputError, LoraSearchError
from lora_search.progress import Progress, leaderboard, next_steps
from lora_search.ranking import best_of

if TYPE_CHECKING:
    from lora_search.data import Splits
    from lora_search.study import SweepStudy

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
        if arguments.config_path:
            raise InputError("-cp: sweeps lie in sweeps/. Add a folder of your own with -cd.")
        more = Path(arguments.config_dir) if arguments.config_dir else None
        name = arguments.config_name or DEFAULT_SWEEP
        if arguments.help:
            progress.console.print(help_page(name, arguments.overrides, more), markup=False, soft_wrap=True)
            return 0
        if _only_informs(arguments):
            return _inform()
        config = compose(name, arguments.overrides, more)
        run_sweep(config, name, progress)
    except LoraSearchError as error:
        progress.console.print(str(error), markup=False, style="red", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        progress.event("interrupted: nothing is lost, the same command goes on")
        return 130
    return 0


def run_sweep(config: SweepConfig, sweep_name: str, progress: Progress) -> None:
    """Prepare, search, conclude."""
    from lora_search.data import prepare, write_pairs
    from lora_search.engine import Room, build_engine
    from lora_search.model import load_base, load_tokenizer, pick_device, resolve_model
    from lora_search.note import write_note
    from lora_search.preflight import check_amount, check_places, describe_rows, describe_search
    from lora_search.reading import load_rows
    from lora_search.space import parse_space
    from lora_search.study import SweepStudy, check_study
    from lora_search.tracking import make_tracker
    from lora_search.worker import work

    signal.signal(signal.SIGTERM, _interrupt)
    folder = Path(config.runs_dir) / config.study.name
    space = parse_space(config)
    check_study(config, space)
    pick_device(config.engine.device)
    tracker = make_tracker(
        config, {"model": config.model.path, "data": config.data.path, "seed": config.seed}
    )
    rows = load_rows(config.data)
    check_places(config)
    for line in describe_search(config, space):
        progress.event(line)
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
    attributes = _attributes(config, sweep_name, source, splits)
    fingerprint = _fingerprint(config, splits, str(base.dtype).removeprefix("torch."))
    study = SweepStudy.open(config, space, fingerprint, attributes, folder)
    write_pairs(splits, folder / "data")  # now that no other sweep's lie there
    progress.event(
        f"study {config.study.name}: {study.summary().finished} of {config.study.n_trials} trials done"
    )
    is_new = "base_perplexity" not in study.attributes()
    base_perplexity = study.remember("base_perplexity", lambda: repr(engine.evaluate_base()))
    progress.event(
        f"base model on {base.device}, {base.dtype}: validation perplexity {float(base_perplexity):.3f}"
    )
    if is_new:
        write_note(study.study, config, space, attributes["command"], float(base_perplexity))
    if not study.is_finished:
        with progress:
            work(study, engine, tracker, progress)
    _conclude(study, folder, config, progress)


def _conclude(study: "SweepStudy", folder: Path, config: SweepConfig, progress: Progress) -> None:
    """Show the leaderboard, write report and best adapter, and say what to type next."""
    from lora_search.export import export_best
    from lora_search.report import write_report

    rows, attributes = study.rows(), study.attributes()
    base_perplexity = float(attributes["base_perplexity"])
    best = export_best(rows, attributes, folder)
    write_report(rows, attributes, base_perplexity, folder / "report.html")
    progress.console.print(leaderboard(rows, base_perplexity))
    if study.exhausted:
        progress.event(
            "the space is exhausted: every combination has been tried, so fewer trials than n_trials ran"
        )
    progress.console.print("Next:")
    found = f"{best}/adapter" if best else "not here: see the warning above" if best_of(rows) else "none yet"
    progress.console.print(next_steps(config, folder, found), markup=False, soft_wrap=True)


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
    from importlib.metadata import version

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


def _only_informs(arguments: object) -> bool:
    flags = (
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
    """Let Hydra answer --cfg, --info and the like."""
    sys.argv[1:] = [as_override(a) if "=" in a and not a.startswith("-") else a for a in sys.argv[1:]]
    hydra.main(version_base="1.3", config_path=str(SWEEPS), config_name=DEFAULT_SWEEP)(_ignore)()
    return 0


def _ignore(_: object) -> None:
    """Hydra never gets as far as running a job."""


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
