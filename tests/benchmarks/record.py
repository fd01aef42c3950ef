"""`python -m tests.benchmarks.record FOLDER [FAMILY ...]`: records validation curves for `search`, `pruning`.

SmolLM2 on few rows of two data sets, without pruning: the packaged FAQ, and what NumPy's functions do from
their documentation. Random settings up to divergence; every fourth trial repeats the one two before with
another seed. FOLDER keeps checkpoints, so it can be stopped and run again; curves.json gets the trials that
have ended, with the NLL of every validation row at the best rung. 6 to 12 seconds a new trial on one core.
"""

import inspect
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_search.files.row_scores import read_scores
from lora_search.settings.composition import compose
from lora_search.training import train

CURVES = Path(__file__).with_name("curves.json")
MODULES = (np, np.linalg, np.fft, np.random, np.ma, np.polynomial.polynomial)
RANKS, BATCHES = (8, 16, 32), (2, 4, 8)
ANSWER = range(31, 160)  # characters
DOCS = ("data=jsonl", "template=inst", "data.max_length=160", "data.on_control_text=keep")
FAQ = ("data.max_length=64",)


@dataclass(frozen=True)
class Recording:
    """A family of curves: its data, rows to train on and to validate by, epochs, rungs per epoch."""

    data: tuple[str, ...]
    rows: tuple[int, int]
    epochs: int
    evals_per_epoch: int
    num_trials: int = 22
    rates: tuple[float, float] = (5e-5, 2e-2)
    dtype: str = "bfloat16"

    @property
    def settings(self) -> tuple[str, ...]:
        train_rows, validation_rows = self.rows
        return (
            *self.data, f"data.max_train_examples={train_rows}",
            f"data.max_validation_examples={validation_rows}",
            f"train.epochs={self.epochs}", f"train.evals_per_epoch={self.evals_per_epoch}", "tracker=none",
            f"engine.dtype={self.dtype}", "optim.warmup_ratio=0.05",
        )  # fmt: skip


RECORDINGS = {
    "faq": Recording((), (64, 20), 2, 4, 28, (5e-5, 5e-3)),  # recorded by a sweep, other draws
    "docs": Recording(DOCS, (48, 16), 2, 3, 35, dtype="float32"),
    "faq1": Recording(FAQ, (40, 10), 1, 5),
    "docs1": Recording(DOCS, (64, 12), 1, 4),
    "faq3": Recording(FAQ, (16, 8), 3, 3),
    "docs6": Recording(DOCS, (16, 10), 6, 2),
}


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


def drawn(recording: Recording) -> list[dict[str, object]]:
    """Return the settings of all trials."""
    rng, settings = np.random.default_rng(0), list[dict[str, object]]()
    for number in range(recording.num_trials):
        lr = float(f"{math.exp(rng.uniform(*map(math.log, recording.rates))):.4g}")
        r, batch = int(rng.choice(RANKS)), int(rng.choice(BATCHES))
        fresh: dict[str, object] = {"optim.lr": lr, "lora.r": r, "train.batch_size": batch}
        settings.append(dict(settings[-2]) if number % 4 == 3 else fresh)
    return settings


def record(name: str, folder: Path) -> None:
    """Train the family's trials; write the curve of each when it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    recording = RECORDINGS[name]
    rows, settings, own = folder / "rows.jsonl", drawn(recording), list[str]()
    if recording.data == DOCS:
        rows.write_text("".join(json.dumps(row) + "\n" for row in documented()))
        own = [f"data.path={rows}"]
    losses: dict[int, list[float]] = {}
    ended: dict[int, dict[str, object]] = {}
    for m in train(compose("construction_faq", [*recording.settings, *own]), settings, folder):
        losses.setdefault(m.trial_number, []).append(round(m.validation_loss, 5))
        if m.ended is not None:
            number, scores = m.trial_number, read_scores(folder / str(m.trial_number))
            by_row = [] if scores is None else (scores[0].nll_R / scores[0].tokens_R).round(3).tolist()
            trial = {"params": settings[number], "tokens": m.train_tokens, "losses": losses[number]}
            ended[number] = {**trial, "ended": m.ended, "row_losses": by_row}
            write(name, [ended[number] for number in sorted(ended)])


def write(name: str, trials: list[dict[str, object]]) -> None:
    """Write the family's curves, a trial a line."""
    families = json.loads(CURVES.read_text())
    families[name] = {"settings": RECORDINGS[name].settings, "trials": trials}
    CURVES.write_text(as_text(families))


def as_text(families: dict[str, dict[str, object]]) -> str:
    """Return JSON, a trial a line."""
    parts = []
    for name, family in families.items():
        lines = ",\n".join(json.dumps(trial) for trial in family["trials"])  # type: ignore[attr-defined]
        parts.append(f'"{name}": {{"settings": {json.dumps(family["settings"])}, "trials": [\n{lines}\n]}}')
    return "{" + ",\n".join(parts) + "}\n"


def main() -> None:
    for name in sys.argv[2:] or [name for name in RECORDINGS if name[-1].isdigit()]:
        record(name, Path(sys.argv[1]) / name)


if __name__ == "__main__":
    main()
