"""`python -m tests.benchmarks.record_docs FOLDER`: records a second family of curves, for `search`.

SmolLM2 learns what NumPy's functions do from their documentation: 48 rows to train on, 16 to validate by,
2 epochs of 3 rungs, random settings up to divergence, no pruning. Every fourth trial repeats the settings of
the one two before with another seed. FOLDER keeps checkpoints, so it can be stopped and run again;
curves_docs.json gets the curves of the trials that have ended. About half a minute a trial on one core.
"""

import inspect
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lora_search.files.row_scores import read_scores
from lora_search.settings.composition import compose
from lora_search.training import train

CURVES = Path(__file__).with_name("curves_docs.json")
MODULES = (np, np.linalg, np.fft, np.random, np.ma, np.polynomial.polynomial)
LR, RANKS, BATCHES = (5e-5, 2e-2), (8, 16, 32), (2, 4, 8)
NUM_TRIALS = 80
ANSWER = range(31, 160)  # characters
SETTINGS = (
    "data=jsonl", "data.max_train_examples=48", "data.max_validation_examples=16", "data.max_length=160",
    "data.on_control_text=keep", "template=inst", "train.epochs=2", "train.evals_per_epoch=3", "tracker=none",
    "optim.warmup_ratio=0.05",
)  # fmt: skip


def documented() -> Iterator[dict[str, str]]:
    """Yield what NumPy's functions do, in the first sentences of their own documentation."""
    seen = set()
    for module in MODULES:
        for name, function in sorted(vars(module).items()):
            if name.startswith("_") or not callable(function) or inspect.isclass(function):
                continue
            parts = [
                p for p in (inspect.getdoc(function) or "").split("\n\n") if not p.startswith(f"{name}(")
            ]
            answer = " ".join(parts[0].split()) if parts else ""
            if len(answer) in ANSWER and "(x" not in answer and answer not in seen:
                seen.add(answer)
                yield {"question": f"What does {module.__name__}.{name} do?", "answer": answer}


def drawn() -> list[dict[str, object]]:
    """Return the settings of all trials."""
    rng, settings = np.random.default_rng(0), list[dict[str, object]]()
    for number in range(NUM_TRIALS):
        lr = float(f"{math.exp(rng.uniform(*map(math.log, LR))):.4g}")
        r, batch = int(rng.choice(RANKS)), int(rng.choice(BATCHES))
        fresh: dict[str, object] = {"optim.lr": lr, "lora.r": r, "train.batch_size": batch}
        settings.append(dict(settings[-2]) if number % 4 == 3 else fresh)
    return settings


def row_losses(folder: Path) -> list[float]:
    """Return the NLL of every validation row at the trial's best rung."""
    found = read_scores(folder)
    return [] if found is None else (found[0].nll_R / found[0].tokens_R).round(3).tolist()


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rows, settings = folder / "rows.jsonl", drawn()
    rows.write_text("".join(json.dumps(row) + "\n" for row in documented()))
    config = compose("construction_faq", [*SETTINGS, f"data.path={rows}"])
    losses: dict[int, list[float]] = {}
    ended: dict[int, dict[str, object]] = {}
    for m in train(config, settings, folder):
        losses.setdefault(m.trial_number, []).append(round(m.validation_loss, 5))
        if m.ended == "finished":
            number = m.trial_number
            trial = {"params": settings[number], "tokens": m.train_tokens, "losses": losses[number]}
            ended[number] = {**trial, "row_losses": row_losses(folder / str(number))}
            write(ended)


def write(trials: Mapping[int, Mapping[str, object]]) -> None:
    """Write the curves so far, a trial a line."""
    lines = ",\n".join(json.dumps(trials[number]) for number in sorted(trials))
    about = f'"numpy": "{np.__version__}", "settings": {json.dumps(SETTINGS)}'
    CURVES.write_text(f'{{{about}, "trials": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
