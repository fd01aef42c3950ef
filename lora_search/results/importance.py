"""The importance of each searched setting: the share of the ranking that it explains alone, with certainty.

Pruned trials count in full: all trials are compared at the last rung that every one of them reached, by the
best value until there. Ranks, so that a diverged trial is the last one and no more. The share is the adjusted
correlation ratio of the ranks (epsilon squared, Kelley 1935), its interval a bootstrap over trials, its
p-value a permutation test. Settings that the sampler chose together share what they explain. Pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_search.results.formatting import show_value
from lora_search.results.verdict import split_keys
from lora_search.trial import TrialRow

FEWEST_TRIALS = 8
FEW_VALUES = 6  # a number with more values is cut into groups of like size
GROUP_TRIALS = 5  # at least so many trials in each
MOST_GROUPS = 4
DRAWS = 400
SURE = 0.05


@dataclass(frozen=True)
class Importance:
    """One setting. ``share`` of the ranking's variance, 0 to 1, with a 95 % interval."""

    key: str
    share: float
    low: float
    high: float
    p_value: float
    trials: int
    rung: int

    @property
    def is_sure(self) -> bool:
        return self.p_value < SURE


def importances(rows: Sequence[TrialRow]) -> list[Importance]:
    """Return the settings that differ between trials, most important first; empty with too few trials."""
    measured = [row for row in rows if row.perplexities]
    if len(measured) < FEWEST_TRIALS:
        return []
    rung = min(max(row.perplexities) for row in measured)
    values = np.array([_best_until(row, rung) for row in measured])
    found = []
    for key in split_keys(measured)[0]:
        has_it = np.array([key in row.params for row in measured])
        groups = groups_of([row.params[key] for row in measured if key in row.params])
        if has_it.sum() >= FEWEST_TRIALS and len(set(groups)) > 1:
            found.append(_importance(key, _ranks(values[has_it]), groups, rung))
    return sorted(found, key=lambda one: (-one.share, one.p_value))


def groups_of(values: Sequence[object]) -> np.ndarray:
    """Return the group of each value: of like values, or of like numbers where there are many."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > FEW_VALUES:
        count = min(MOST_GROUPS, max(2, len(numbers) // GROUP_TRIALS))
        ends = np.quantile(numbers, np.linspace(0, 1, count + 1)[1:-1])
        return np.searchsorted(ends, numbers, side="left")
    return np.unique([show_value(value) for value in values], return_inverse=True)[1]


def explained(ranks: np.ndarray, groups: np.ndarray) -> float:
    """Return the adjusted share of the ranks' variance between the groups, at least 0."""
    counts = np.bincount(groups)
    sums, counts = np.bincount(groups, ranks)[counts > 0], counts[counts > 0]
    num_trials, num_groups = len(ranks), len(counts)
    total = float(((ranks - ranks.mean()) ** 2).sum())
    if total == 0 or num_groups < 2 or num_trials <= num_groups:
        return 0.0
    between = float((sums**2 / counts).sum() - ranks.sum() ** 2 / num_trials)
    return max(0.0, 1 - (1 - between / total) * (num_trials - 1) / (num_trials - num_groups))


def _importance(key: str, ranks: np.ndarray, groups: np.ndarray, rung: int) -> Importance:
    draw, num_trials = np.random.default_rng(0), len(ranks)
    share = explained(ranks, groups)
    by_chance = [explained(draw.permutation(ranks), groups) for _ in range(DRAWS)]
    p_value = (1 + sum(other >= share - 1e-12 for other in by_chance)) / (1 + DRAWS)
    picks = [draw.integers(0, num_trials, num_trials) for _ in range(DRAWS)]
    low, high = np.percentile([explained(ranks[pick], groups[pick]) for pick in picks], (2.5, 97.5))
    return Importance(key, share, float(low), float(high), p_value, num_trials, rung)


def _best_until(row: TrialRow, rung: int) -> float:
    values = [v for k, v in row.perplexities.items() if k <= rung and math.isfinite(v)]
    return min(values, default=math.inf)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0, the mean of them where values are equal."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]
