"""A study as the reports see it, of the size a real sweep has."""

import math

from lora_search.trial import TrialRow

BASE_PERPLEXITY = 14.2
HOSTILE = '<script>alert("x")</script>&lt;%{y}'
ATTRIBUTES = {
    "study": "faq",
    "sweep": "construction_faq",
    "base_model": "/models/smollm2",
    "base_model_name": "smollm2-135m-instruct",
    "base_perplexity": "14.2",
    "git_commit": "5cec805",
    "data.train": "402",
    "data.duplicates": "3",
    "version/torch": "2.13.0",
    "setting/sweep.train.evals_per_epoch": "4",
    "setting/sweep.lora.dropout": "0.05",
    "setting/sweep.lora.r": "16",
}


def make_row(
    number: int, state: str = "COMPLETE", best: float | None = 8.0, rungs: int = 12, reason: str = ""
) -> TrialRow:
    """Return a trial whose curve falls from the base model's perplexity to its best at its last rung."""
    fall = 0.0 if best is None else BASE_PERPLEXITY - best
    shape = [(math.exp(-rung / 3) - math.exp(-rungs / 3)) for rung in range(1, rungs + 1)]
    curve = {} if best is None else {k: best + fall * share for k, share in enumerate(shape, start=1)}
    targets = "all-linear" if number % 2 else '["q_proj", "v_proj"]'
    return TrialRow(
        number=number, state=state, perplexity=best, best_rung=rungs if curve else None,
        params={"lora.r": 8 << number % 3, "optim.lr": 1e-4 * 1.7**number, "lora.target_modules": targets},
        perplexities=curve, reason=reason, examples_seen=100 * rungs, train_tokens=6100 * rungs,
        train_seconds=9.3 * rungs,
    )  # fmt: skip


ROWS = [
    *(make_row(number, best=9.0 - number / 10) for number in range(6)),
    *(make_row(n, "PRUNED", 11.0 + n / 10, 3, f"rung 3: not among the best {n} of 9") for n in range(6, 14)),
    make_row(14, "FAIL", None, 1, f"diverged: {HOSTILE}"),
    make_row(15, "RUNNING", 10.0, 4),
]
BEST = ROWS[5]
