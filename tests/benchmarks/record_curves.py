"""`python -m tests.benchmarks.record_curves FOLDER`: records the validation curves that `pruning` replays.

An ordinary sweep of the default model and data, without pruning and with random settings, so it can be
interrupted and continued. About an hour on one core; FOLDER keeps the study, curves.json gets the curves.
"""

import json
import sys
from pathlib import Path

from lora_search.output.terminal import Progress
from lora_search.settings.composition import compose
from lora_search.settings.schema import SweepConfig
from lora_search.study.study import SweepStudy
from lora_search.sweep import run_sweep

CURVES = Path(__file__).with_name("curves.json")
SETTINGS = (
    "study.name=curves", "study.n_trials=28", "study.first_trial_is_default=false",
    "sampler=random", "pruner=none", "tracker=none", "engine.dtype=bfloat16",
    "data.max_train_examples=64", "data.max_validation_examples=20",
    "train.epochs=2", "train.evals_per_epoch=4",
    "lora.r=choice(8,16,32)", "train.batch_size=choice(2,4,8)", "optim.lr=tag(log,interval(5e-5,5e-3))",
)  # fmt: skip


def write_curves(config: SweepConfig) -> None:
    """Write the curves of the trials that are complete."""
    rows, attributes = SweepStudy.read(config.study)
    trials = [
        {"params": row.params, "tokens": row.train_tokens, "perplexities": list(row.perplexities.values())}
        for row in rows
        if row.state == "COMPLETE"
    ]
    base = float(attributes["base_perplexity"])
    recorded = {"settings": SETTINGS, "base_perplexity": base, "trials": trials}
    CURVES.write_text(json.dumps(recorded, indent=1) + "\n")


def main() -> None:
    folder = Path(sys.argv[1])
    storage = f"study.storage=sqlite:///{folder.resolve()}/curves.db"
    config = compose("construction_faq", [*SETTINGS, storage, f"runs_dir={folder}"])
    run_sweep(config, "construction_faq", Progress())
    write_curves(config)


if __name__ == "__main__":
    main()
