"""One measurement of our engine, in a process of its own: prints JSON.

Arguments: dtype, slots, tokens per pass. Trains `slots` trials of batch 8 for about TOKENS tokens, without a
rung in between, then evaluates all of them; one trial alone goes on to the end of its epoch.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from lora_search.data.preparation import prepare
from lora_search.data.rows import Splits
from lora_search.engine.build import Room, build_engine
from lora_search.engine.engine import Engine
from lora_search.engine.evaluation import score_rows
from lora_search.model.loading import load_base, load_tokenizer, resolve_model
from lora_search.reading.load import load_rows
from lora_search.settings.composition import compose
from lora_search.settings.overlay import trial_settings
from lora_search.trial import TrialRun

BATCH, ROWS, TOKENS = 8, 64, 4000


def tokens_of(splits: Splits) -> int:
    return sum(len(row.input_ids) for row in splits.train)


def training_rate(engine: Engine) -> float:
    """Return tokens per second over about TOKENS tokens, the first pass left out."""
    engine.advance()
    start, before = time.perf_counter(), trained(engine)
    while trained(engine) - before < TOKENS:
        engine.advance()
        assert engine.free_slots == 0, "no trial may come to its end meanwhile"
    return (trained(engine) - before) / (time.perf_counter() - start)


def trained(engine: Engine) -> int:
    return sum(slot.train_tokens + slot.batch.num_tokens for slot in engine.slots if slot is not None)


def main() -> None:
    dtype, slots, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    overrides = ["train.evals_per_epoch=1", f"data.max_train_examples={ROWS}", f"train.batch_size={BATCH}"]
    overrides += [f"engine.dtype={dtype}", f"engine.slots={slots}", f"engine.tokens_per_pass={tokens}"]
    config = compose("construction_faq", [*overrides, "data.max_validation_examples=32"])
    source = resolve_model(config.model)
    splits = prepare(config, load_rows(config.data), load_tokenizer(source, config.model))
    base = load_base(source, config.model, config.engine)
    settings = [trial_settings(config, {})] * slots
    engine, _ = build_engine(config, Room.of(settings), base, splits, {})
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            TrialRun(number=i, seed=i, settings=s, folder=str(Path(folder) / str(i)))
            for i, s in enumerate(settings)
        ]
        engine.admit(runs)
        train = training_rate(engine)
        start = time.perf_counter()
        score_rows(engine.model, range(slots), splits.validation, tokens, engine.num_shared)
        seconds = time.perf_counter() - start
        result = {
            "train": train,
            "validation": slots * sum(len(row.input_ids) for row in splits.validation) / seconds,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "parameters": sum(p.numel() for p in base.model.parameters()),
            "base_perplexity": engine.evaluate_base().perplexity,
        }
        while slots == 1 and engine.free_slots == 0:
            for measurement in engine.advance():
                result["perplexity"] = measurement.perplexity
    print(json.dumps(result))  # noqa: T201 (its result)


if __name__ == "__main__":
    main()
