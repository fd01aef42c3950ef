"""`python -m lora_search.plan -cn NAME key=value ...`: forecast tokens, time, cost and memory of a sweep.

Loads data and base as the sweep does, trains for some seconds with all slots busy, and discards the result;
it creates no study. The forecast is stored next to the runs; at its end the sweep compares it with the facts.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("plan")

# isort: split

from lora_search.command_line import run, study_parser
from lora_search.output.forecast_text import forecast_lines, write_forecast
from lora_search.output.terminal import Progress
from lora_search.search.forecast import Probe, Shape, drawn_params, forecast, shares_trained
from lora_search.settings.composition import compose
from lora_search.settings.overlay import trial_settings
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import Space, largest, parse_space, smallest
from lora_search.study.opening_checks import check_study
from lora_search.trial import TrialRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_search.data.rows import Example
    from lora_search.engine.engine import Engine

PROBE_SECONDS = 8.0
LEAST_PASSES = 3
BUDGET_TRIALS = 1000  # assumed if only a budget ends the sweep


def main() -> int:
    """Print the forecast of the sweep that the command line names; return the exit code."""
    what = "Forecast a sweep from a probe of seconds, without a study."
    return run(plan, study_parser("plan", what, is_sweep=True))


def plan(arguments: argparse.Namespace, progress: Progress) -> None:
    """Measure, forecast and print; store the forecast for the sweep's end."""
    config = compose(arguments.sweep, arguments.overrides, arguments.config_dir)
    space = parse_space(config)
    _, pruner = check_study(config, space)
    engine = _engine(config, space, progress)
    setup_seconds = time.time() - progress.began
    probe = measure(engine, config, space, setup_seconds)
    shape = shape_of(config, space, engine)
    shares = shares_trained(pruner, shape, config.seed)
    found = forecast(shape, probe, shares)
    for line in forecast_lines(config, shape, probe, found, shares[1], *_bytes(engine, config, space)):
        progress.console.print(line, markup=False, soft_wrap=True)
    write_forecast(found, config)


def shape_of(config: SweepConfig, space: Space, engine: "Engine") -> Shape:
    """Return the sweep's size: trials of the mean length of the space."""
    epochs = (smallest(config, space, "train.epochs") + largest(config, space, "train.epochs")) / 2
    return Shape(
        num_trials=config.study.n_trials or BUDGET_TRIALS,
        num_workers=config.launcher.workers or 1,
        num_slots=len(engine.slots),
        num_rungs=max(1, round(epochs * config.train.evals_per_epoch)),
        trial_tokens=epochs * _num_tokens(engine.splits.train),
    )


def measure(engine: "Engine", config: SweepConfig, space: Space, setup_seconds: float) -> Probe:
    """Train trials of the space in all slots for some seconds, then evaluate them once."""
    params = drawn_params(space, len(engine.slots), config.seed)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [trial_settings(config, drawn) for drawn in params]
        endless = [replace(one, epochs=1000, evals_per_epoch=1) for one in chosen]  # no rung in between
        engine.admit([
            TrialRun(number=i, seed=i, settings=one, folder=str(Path(folder) / str(i)))
            for i, one in enumerate(endless)
        ])  # fmt: skip
        engine.advance()  # the first pass is slower: it allocates memory and compiles kernels
        speed = _tokens_per_second(engine)
        busy = [index for index, slot in enumerate(engine.slots) if slot is not None]
        began = time.perf_counter()
        engine.scores(busy, engine.splits.validation)
        eval_seconds = (time.perf_counter() - began) / len(busy)
        engine.release(range(len(endless)))
    test, validation = (_num_tokens(rows) for rows in (engine.splits.test, engine.splits.validation))
    return Probe(speed, eval_seconds, setup_seconds, 2 * eval_seconds * test / validation)


def _num_tokens(rows: "Sequence[Example]") -> int:
    return sum(len(row.input_ids) for row in rows)


def _tokens_per_second(engine: "Engine") -> float:
    """Return the training speed in wall time, optimizer steps included."""
    began, before, passes = time.perf_counter(), engine.throughput.total_tokens, 0
    while passes < LEAST_PASSES or time.perf_counter() - began < PROBE_SECONDS:
        passes += 1
        if engine.advance():
            break  # the epoch is over
    return (engine.throughput.total_tokens - before) / (time.perf_counter() - began)


def _engine(config: SweepConfig, space: Space, progress: Progress) -> "Engine":
    """Return the engine that the sweep would use."""
    from lora_search.data.store import knows_rows
    from lora_search.engine.build import Room, require_exact
    from lora_search.model.placement import describe_split
    from lora_search.ops.device import pick_devices
    from lora_search.prepare import check_inputs, describe_rows, open_engine, read_inputs
    from lora_search.reading.load import load_rows

    room = Room.of_space(config, space)
    require_exact(config, room, pick_devices(config.engine.device, config.engine.devices_per_worker)[0])
    rows = load_rows(config.data, is_known=knows_rows, watch=progress.watch)
    inputs = read_inputs(config, rows, None, watch=progress.watch)
    progress.events(describe_rows(config, inputs.splits))
    check_inputs(config, space, inputs, None)
    engine, sizes = open_engine(config, room, inputs)
    if split := describe_split(engine.model.language_model):
        progress.event(f"base model on {split}: they compute one after the other")
    size = sizes or f"{len(engine.slots)} slots, {engine.tokens_per_pass} tokens per pass"
    progress.event(f"engine: {size}")
    return engine


def _bytes(engine: "Engine", config: SweepConfig, space: Space) -> tuple[int, int]:
    """Return the peak memory of the probe, and the largest size of an adapter on disk."""
    from lora_search.engine.build import Room, largest_adapter
    from lora_search.ops.device import peak_bytes

    return peak_bytes(engine.model.devices), largest_adapter(engine, Room.of_space(config, space))


if __name__ == "__main__":
    sys.exit(main())
