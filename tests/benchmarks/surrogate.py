"""The truth `gp`: validation curves of settings between the recorded ones, from a Gaussian process.

Over learning rate, rank and batch size, fitted to the log NLL of every rung, all rungs with one kernel. A
task is one fit to the recorded curves with a residual of each drawn anew, as large as what the fit misses of
a curve that it has not seen.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from tests.benchmarks.families import BATCHES, RANKS, Family

KEYS = ("optim.lr", "lora.r", "train.batch_size")


def features(params: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Return settings as points: natural logarithms."""
    return np.log([[float(p[key]) for key in KEYS] for p in params])


class Surrogate:
    """The fit to one family."""

    def __init__(self, family: Family) -> None:
        self.family, self.x_ND = family, features(family.params)
        self.mean_K, self.scale = family.curves_NK.mean(axis=0), float(family.curves_NK.std(axis=0).mean())
        self.y_NK = (family.curves_NK - self.mean_K) / self.scale
        start = np.log([1.0, 1.0, 1.0, 0.1])
        self.theta = minimize(self._cost, start, method="Nelder-Mead", options={"maxiter": 300}).x

    @cached_property
    def factor(self) -> tuple[np.ndarray, bool]:
        return self._factor(self.theta)

    @cached_property
    def left_out_NK(self) -> np.ndarray:
        """What the fit misses, in log NLL, of each curve where it is fitted without that curve."""
        inverse = cho_solve(self.factor, np.eye(len(self.x_ND)))
        return self.scale * (inverse @ self.y_NK) / np.diag(inverse)[:, None]

    def task(self, seed: int) -> "SurrogateTask":
        """Return curves that may be true as well."""
        rng = np.random.default_rng(seed)
        spread = 1.48 * np.median(np.abs(self.left_out_NK))  # a normal's standard deviation, by its median
        level_N = rng.normal(0, spread, (len(self.x_ND), 1))
        return SurrogateTask(self, cho_solve(self.factor, self.y_NK + level_N / self.scale))

    def _kernel(self, a_ND: np.ndarray, b_MD: np.ndarray, theta: np.ndarray) -> np.ndarray:
        distances = ((a_ND[:, None, :] - b_MD[None, :, :]) / np.exp(theta[:3])) ** 2
        return np.asarray(np.exp(-0.5 * distances.sum(axis=2)))

    def _factor(self, theta: np.ndarray) -> tuple[np.ndarray, bool]:
        noise = np.exp(2 * theta[3]) + 1e-6
        return cho_factor(self._kernel(self.x_ND, self.x_ND, theta) + noise * np.eye(len(self.x_ND)))

    def _cost(self, theta: np.ndarray) -> float:
        """Return the negative log likelihood, the scale of each rung fitted."""
        if np.abs(theta).max() > 6:
            return math.inf
        factor = self._factor(theta)
        fit_K = (self.y_NK * cho_solve(factor, self.y_NK)).sum(axis=0)
        num, num_rungs = self.y_NK.shape
        return float(num_rungs * np.log(np.diag(factor[0])).sum() + 0.5 * num * np.log(fit_K).sum())


class SurrogateTask:
    """One search's truth."""

    def __init__(self, surrogate: Surrogate, weights_NK: np.ndarray) -> None:
        self.surrogate, self.weights_NK = surrogate, weights_NK

    def curves(self, params: Sequence[Mapping[str, float]]) -> np.ndarray:
        """Return the perplexities of settings at every rung, without noise."""
        s = self.surrogate
        kernel = s._kernel(features(params), s.x_ND, s.theta)
        return np.asarray(np.exp(np.exp(s.mean_K + s.scale * kernel @ self.weights_NK)))

    def best(self) -> float:
        """Return the lowest perplexity of a dense grid."""
        rates = np.geomspace(*self.surrogate.family.rates, 60)
        points = [
            {"optim.lr": lr, "lora.r": r, "train.batch_size": b}
            for lr in rates
            for r in RANKS
            for b in BATCHES
        ]
        return float(self.curves(points).min())
