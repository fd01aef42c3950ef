"""One measurement of our engine, in a process of its own: prints JSON.

Arguments: dtype, slots, tokens per pass.
"""

import json
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lora_search.assembly import Room, build_engine
from lora_search.composition import compose
from lora_search.data import Splits, prepare
from lora_search.engine import Engine
from lora_search.model import load_base, load_tokenizer, resolve_model
from lora_search.reading import load_rows
from lora_search.space import trial_settings
from lora_search.trial import TrialRun

BATCH, ROWS, ROUNDS = 8, 64, 3


def tokens_of(splits: Splits) -> int:
    return sum(len(row.input_ids) for row in splits.train)


def epoch_seconds(engine: Engine, runs: list[TrialRun], folder: str, attempt: int) -> tuple[float, float]:
    """Train all of them for one epoch without evaluation until its end; return both seconds."""
    again = [replace(run, folder=f"{folder}/{attempt}/{run.number}") for run in runs]
    engine.admit(again)
    start = time.perf_counter()
    while engine.free_slots < len(engine.slots):
        engine.advance()
    whole = time.perf_counter() - start
    start = time.perf_counter()
    engine.evaluate_base()
    return whole, time.perf_counter() - start


def main() -> None:
    dtype, slots, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    overrides = [
        f"data.max_train_examples={ROWS}",
        "data.max_validation_examples=32",
        "train.evals_per_epoch=1",
    ]
    overrides += [f"engine.dtype={dtype}", f"engine.slots={slots}", f"engine.tokens_per_pass={tokens}"]
    config = compose("construction_faq", [*overrides, f"train.batch_size={BATCH}"])
    source = resolve_model(config.model)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(source, config.model)
        splits = prepare(config, load_rows(config.data), tokenizer, Path(folder))
        base = load_base(source, config.model, config.engine)
        settings = [trial_settings(config, {})] * slots
        engine, _ = build_engine(config, Room.of(settings), base, splits)
        runs = [TrialRun(number=i, seed=i, settings=s, folder="") for i, s in enumerate(settings)]
        measured = [epoch_seconds(engine, runs, folder, attempt) for attempt in range(ROUNDS)]
    whole, evaluation = min(measured)
    validation = sum(len(row.input_ids) for row in splits.validation)
    training = whole - slots * evaluation
    print(  # noqa: T201 (its result)
        json.dumps(
            {
                "train": slots * tokens_of(splits) / training,
                "validation": validation / min(e for _, e in measured),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "parameters": sum(p.numel() for p in base.model.parameters()),
            }
        )
    )


if __name__ == "__main__":
    main()
