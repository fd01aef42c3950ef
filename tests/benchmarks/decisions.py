"""`python -m tests.benchmarks.decisions`: CPU milliseconds of a decision of freeze-thaw, as a Markdown table.

Trials of 8 rungs of which half ended at the first, a tenth at the last; half of the others are paused. In the
first row all 50 have whole curves. One thread.
"""

import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from optuna.trial import FrozenTrial, TrialState

from lora_search.search.points import draw
from lora_search.search.thawing import Memory, Thaw
from lora_search.settings.space import parse_space
from tests.benchmarks.simulated import RUNGS, SLOTS, sweep
from tests.benchmarks.study import perplexity

SIZES, REPEATS, MOST_PAUSED, WIDTH = (50, 200, 1000, 5000), 11, 100, 576.0
SPACE = parse_space(sweep("sqlite://", 100_000))


def make_trial(number: int, rungs: int, rng: np.random.Generator) -> FrozenTrial:
    params = draw(SPACE, rng)
    rate = params["optim.lr"]
    assert isinstance(rate, float)
    return FrozenTrial(
        number=number, trial_id=number, state=TrialState.PRUNED, value=None, datetime_start=None,
        datetime_complete=None, params=params, distributions={}, user_attrs={}, system_attrs={},
        intermediate_values={rung: perplexity(rate, number, rung) for rung in range(1, rungs + 1)},
    )  # fmt: skip


def decide(thaw: Thaw, paused: Sequence[FrozenTrial], number: int) -> float:
    """Return the CPU milliseconds of one decision."""
    able, began = [t.number for t in paused][:MOST_PAUSED], time.process_time()
    thaw.choose(paused, able, SLOTS, 10, number)
    return 1000 * (time.process_time() - began)


def measure(rungs: Sequence[int]) -> str:
    """Return the row of a study with trials of so many rungs."""
    kept: list[list[float]] = []
    thaw = Thaw(
        sweep("sqlite://", 100_000), SPACE, WIDTH, Memory(lambda: kept[-1] if kept else None, kept.append)
    )
    rng = np.random.default_rng(0)
    trials = [make_trial(number, count, rng) for number, count in enumerate(rungs)]
    paused = [t for t in trials if t.number % 2 and len(t.intermediate_values) < RUNGS]
    for trial in trials:
        if trial not in paused:
            thaw.add(trial)
    first, *others = (decide(thaw, paused, len(trials) + i) for i in range(REPEATS))
    return f"| {len(trials)} | {sum(rungs)} | {first:.0f} | {statistics.median(others):.0f} |\n"


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    sys.stdout.write("| trials | values | the first, with a fit | others, median |\n|---|---|---|---|\n")
    sys.stdout.write(measure([RUNGS - number % 2 for number in range(SIZES[0])]))
    for size in SIZES:
        sys.stdout.write(measure(rng.choice([1, 2, 3, RUNGS], p=[0.5, 0.2, 0.2, 0.1], size=size).tolist()))


if __name__ == "__main__":
    main()
