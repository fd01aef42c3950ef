"""The truths `table` and `neighbours`: the recorded curves of the nearest settings, without a smooth model.

table: the nearest curve itself, so that nothing is true but what was measured. neighbours: the mean of four
in log NLL, weighted by 1 / distance^2; it goes through the recorded curves, with kinks. A task knows a random
half of the curves, so that another one is best in each. Settings that begin with a bare rung have such
neighbours only. Settings of one curve are trials of their own: each costs in full, with a new seed's noise.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tests.benchmarks.families import BATCHES, RANKS, Family

STEP = 0.1  # of rank or batch size, in ranges of the log rate: about what misses least of curves left out
FAR = 10.0  # between settings whose first rung is bare and others: farther than any of a kind
NEAR = 1e-6  # added to squared distances: curves of the same settings weigh the same


class Nearby:
    """Truths by the nearest curves of one family."""

    def __init__(self, family: Family, num_neighbours: int) -> None:
        self.family, self.num_neighbours = family, num_neighbours

    @property
    def left_out_NK(self) -> np.ndarray:
        """What is missed, in log NLL, of each curve where only the others are known."""
        everything = np.arange(len(self.family.params))
        rows = [
            NearbyTask(self, np.delete(everything, n)).log_losses([one])[0]
            for n, one in enumerate(self.family.params)
        ]
        return self.family.curves_NK - np.array(rows)

    def task(self, seed: int) -> "NearbyTask":
        """Return a truth that knows half of the curves; which one counts of equally near ones is drawn."""
        order = np.random.default_rng(seed).permutation(len(self.family.params))
        return NearbyTask(self, order[: len(order) // 2])


class NearbyTask:
    """One search's truth."""

    def __init__(self, nearby: Nearby, known: np.ndarray) -> None:
        self.family, self.num_neighbours = nearby.family, nearby.num_neighbours
        self.params = [self.family.params[n] for n in known]
        self.x_ND, self.curves_NK = places(self.family, self.params), self.family.curves_NK[known]

    def log_losses(self, params: Sequence[Mapping[str, float]]) -> np.ndarray:
        """Return log NLL at every rung, [M, K]."""
        squares_MN = ((places(self.family, params)[:, None] - self.x_ND[None]) ** 2).sum(axis=2)
        near_MP = np.argsort(squares_MN, axis=1, kind="stable")[:, : self.num_neighbours]
        weights_MP = 1 / (np.take_along_axis(squares_MN, near_MP, axis=1) + NEAR)
        weights_MP /= weights_MP.sum(axis=1, keepdims=True)
        return np.asarray((weights_MP[:, :, None] * self.curves_NK[near_MP]).sum(axis=1))

    def curves(self, params: Sequence[Mapping[str, float]]) -> np.ndarray:
        """Return the perplexities of settings at every rung, without noise."""
        return np.asarray(np.exp(np.exp(self.log_losses(params))))

    def best(self) -> float:
        """Return the lowest perplexity: a weighted mean is never below the known curves."""
        return float(self.curves(self.params).min())


def places(family: Family, params: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Return settings as points: learning rate, rank, batch size, whether the first rung is bare."""
    low, high = family.rates
    return np.array([
        [math.log(one["optim.lr"] / low) / math.log(high / low), STEP * RANKS.index(int(one["lora.r"])),
         STEP * BATCHES.index(int(one["train.batch_size"])), FAR * family.untrained_rung(one)]
        for one in params
    ])  # fmt: skip
