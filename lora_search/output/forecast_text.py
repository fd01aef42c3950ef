"""A forecast in words, and in a file."""

import json
from dataclasses import asdict
from pathlib import Path

from lora_search.files.atomic import explained_writing, write_file
from lora_search.results.costs import forecast_file
from lora_search.results.formatting import show_count, show_seconds
from lora_search.search.forecast import Forecast, Probe, Shape, trials_within
from lora_search.settings.schema import SweepConfig

KEPT_ADAPTERS = 1  # of each trial: the one of its best rung
CHECKPOINT = 3  # a running trial's checkpoint holds the adapter and two moments


def forecast_lines(
    config: SweepConfig,
    shape: Shape,
    probe: Probe,
    found: Forecast,
    share: float,
    memory_bytes: int,
    adapter_bytes: int,
) -> list[str]:
    """Return the forecast, one line per question."""
    size = config.engine.tokens_per_pass
    passes = found.trial_tokens / size if isinstance(size, int) else 1.0
    price = config.study.price_per_hour
    trials = "a budget alone ends it" if config.study.n_trials is None else f"{shape.num_trials} trials"
    disk = adapter_bytes * (shape.num_trials * KEPT_ADAPTERS + shape.num_slots * CHECKPOINT) / 2**20
    lines = [
        f"probe        {probe.train_tokens_per_second:,.0f} training tokens/s with {shape.num_slots} slots; "
        f"{probe.eval_seconds:.2f} s to evaluate a trial",
        f"one trial    {show_count(round(found.trial_tokens))} tokens, {passes:,.0f} full passes' worth, "
        f"{shape.num_rungs} rungs, {show_seconds(found.trial_seconds)} of a worker",
    ]
    if config.study.n_trials is not None:
        low, expected, high = (show_seconds(seconds) for seconds in found.seconds)
        tokens = [show_count(round(count)) for count in found.tokens]
        lines.append(f"the sweep    {expected} ({low} to {high}, by what is pruned), {trials}, "
                     f"{tokens[1]} tokens ({tokens[0]} to {tokens[2]})")  # fmt: skip
        if price is not None:
            costs = [seconds / 3600 * price * shape.num_workers for seconds in found.seconds]
            lines.append(f"cost         {costs[1]:.3g} ({costs[0]:.3g} to {costs[2]:.3g})")
        lines.append(f"disk         up to {disk:,.0f} MiB of adapters and checkpoints")
    devices = config.engine.devices_per_worker
    place = f", on the fullest of {devices} GPUs" if devices > 1 else ""
    lines.append(f"memory       {memory_bytes / 2**30:.1f} GiB at the probe's peak, base included{place}")
    lines.append(f"cost driver  {_driver(found)}")
    return lines + _budget_lines(config, shape, probe, found, share)


def _driver(found: Forecast) -> str:
    training, evaluation = "train.epochs or data.max_train", "train.evals_per_epoch or data.max_validation"
    what = training if found.training_share >= 0.5 else evaluation
    return f"training is {found.training_share:.0%} of the time: fewer {what}_examples save most"


def _budget_lines(
    config: SweepConfig, shape: Shape, probe: Probe, found: Forecast, share: float
) -> list[str]:
    """Return the number of trials that each budget covers."""
    study, lines = config.study, []
    if study.max_hours is not None:
        count = trials_within(study.max_hours * 3600, shape, probe, share, found.trial_seconds)
        lines.append(f"budget       study.max_hours={study.max_hours:g}: about {count} trials")
    if study.max_cost is not None and study.price_per_hour is not None:
        hours = study.max_cost / study.price_per_hour / shape.num_workers
        count = trials_within(hours * 3600, shape, probe, share, found.trial_seconds)
        lines.append(f"budget       study.max_cost={study.max_cost:g}: about {count} trials")
    if study.max_tokens is not None:
        count = int(study.max_tokens / (share * found.trial_tokens))
        lines.append(f"budget       study.max_tokens={study.max_tokens}: about {count} trials")
    return lines


def write_forecast(found: Forecast, config: SweepConfig) -> None:
    """Write the forecast next to the study's folder. Raises WriteError."""
    kept = {**asdict(found), "n_trials": config.study.n_trials}
    with explained_writing(Path(config.runs_dir)):
        write_file(
            forecast_file(Path(config.runs_dir) / config.study.name), json.dumps(kept, indent=1).encode()
        )
