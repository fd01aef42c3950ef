"""The engine without a study: train N settings packed, on one data set, and yield their measurements.

from lora_search.settings.schema import DataConfig, ModelConfig, SweepConfig
from lora_search.training import train

config = SweepConfig(
    model=ModelConfig(path="smollm2-135m-instruct"),  # or a folder, or a hub id
    data=DataConfig(path="faq.jsonl", max_train_examples=200),
)
settings = [
    {"lora.r": 8, "optim.lr": 2e-4},
    {"lora.r": 32, "optim.lr": 1e-3, "lora.target_modules": ["q_proj", "v_proj", "up_proj"]},
]
best = {}
for m in train(config, settings, "runs/by_hand", stop=lambda m: m.rung == 2 and m.perplexity > 40):
    best[m.trial_number] = m.best_perplexity  # the adapter is in runs/by_hand/<number>/adapter
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lora_search.data.order import DataAxis
from lora_search.data.preparation import write_pairs
from lora_search.engine.build import Room
from lora_search.engine.effect_checks import check_effect
from lora_search.engine.engine import Engine
from lora_search.errors import ConfigError
from lora_search.prepare import open_engine, read_inputs
from lora_search.reading.load import load_rows
from lora_search.settings.overlay import searchable_keys, trial_seed, trial_settings
from lora_search.settings.schema import SweepConfig
from lora_search.trial import Measurement, TrialRun


def train(
    config: SweepConfig,
    settings: Sequence[Mapping[str, object]],
    folder: str | Path,
    stop: Callable[[Measurement], bool] = lambda _: False,
) -> Iterator[Measurement]:
    """Yield the measurements of all trials; trial i overrides ``config`` with ``settings[i]``.

    A trial ends early if ``stop`` returns True; a failed one yields ``ended="failed"`` with the reason in
    ``detail``. A trial with a checkpoint under ``folder`` yields its recorded measurements and resumes.
    Raises ConfigError, DataError or ModelError before training starts.
    """
    for key in (key for chosen in settings for key in chosen):
        if key not in searchable_keys():
            raise ConfigError(
                key, key, "is not a setting of a trial", f"There are: {', '.join(searchable_keys())}"
            )
    chosen = [trial_settings(config, params) for params in settings]
    place = Path(folder).resolve()
    runs = [
        TrialRun(
            number=i, seed=trial_seed(config, settings[i], i), settings=trial, folder=str(place / str(i))
        )
        for i, trial in enumerate(chosen)
    ]
    room = Room.of(chosen)
    inputs = read_inputs(config, load_rows(config.data), None, room)
    check_effect(chosen, DataAxis(inputs.splits.train, config.seed))
    write_pairs(inputs.splits, place / "data")
    engine, _ = open_engine(config, room, inputs)
    yield from train_all(engine, runs, stop)


def train_all(
    engine: Engine, runs: Sequence[TrialRun], stop: Callable[[Measurement], bool] = lambda _: False
) -> Iterator[Measurement]:
    """Train the runs to their ends, the next one in a slot as soon as it is free; yield every measurement."""
    waiting = list(reversed(runs))
    while waiting or engine.free_slots < len(engine.slots):
        engine.admit([waiting.pop() for _ in range(min(engine.free_slots, len(waiting)))])
        for measurement in engine.advance():
            if stop(measurement):
                engine.release([measurement.trial_number])
            yield measurement
