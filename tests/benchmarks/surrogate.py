"""Validation curves of settings between the recorded ones: a Gaussian process over (lr, rank, batch size).

Fitted to the log NLL of every rung, all rungs with one kernel. A task is one fit to the recorded curves with
a residual of each drawn anew, as large as what the fit misses of a curve that it has not seen.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

CURVES = Path(__file__).with_name("curves.json")  # from `record`
KEYS = ("optim.lr", "lora.r", "train.batch_size")
# NLL of a diverged trial: how far it went tells nothing. About half a nat above the bare base's.
WORST, WORSE_BASES = 4.0, {"faq1": 4.8, "faq3": 4.8}
BARE = ("faq1", "faq3", "docs6")  # first rung after 8 rows: batch 8 measures the bare base, by warm-up
SEED_NOISE = 0.0025  # sd of a perplexity between two seeds, relative; measured on SmolLM2


@dataclass(frozen=True)
class Family:
    """Recorded curves of one data set: settings, and log NLL at every rung."""

    name: str
    rates: tuple[float, float]  # learning rates that were recorded
    params: tuple[Mapping[str, float], ...]
    curves_NK: np.ndarray

    def untrained_rung(self, params: Mapping[str, float]) -> int:
        """Return the last rung at which a trial's learning rate was still 0; 0 if there is none."""
        return int(self.name in BARE and params["train.batch_size"] == 8)

    @property
    def num_rungs(self) -> int:
        return int(self.curves_NK.shape[1])


def families(*names: str) -> list[Family]:
    """Return what is recorded: all, or the families of these names."""
    recorded = json.loads(CURVES.read_text())
    return [family_of(name, recorded[name]["trials"]) for name in names or recorded]


def family_of(name: str, trials: Sequence[Mapping[str, Any]]) -> Family:
    """Return recorded curves as a family; a diverged one stays where it was worst."""
    num_rungs, worst = max(len(trial["losses"]) for trial in trials), WORSE_BASES.get(name, WORST)
    losses = [[*t["losses"], *[worst] * (num_rungs - len(t["losses"]))] for t in trials]
    rates = (5e-5, 5e-3 if name == "faq" else 2e-2)
    return Family(name, rates, tuple(t["params"] for t in trials), np.log(np.minimum(losses, worst)))


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

    def task(self, seed: int) -> "Task":
        """Return curves that may be true as well."""
        rng = np.random.default_rng(seed)
        spread = 1.48 * np.median(np.abs(self.left_out_NK))  # a normal's standard deviation, by its median
        level_N = rng.normal(0, spread, (len(self.x_ND), 1))
        return Task(self, cho_solve(self.factor, self.y_NK + level_N / self.scale), seed)

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


class Task:
    """One search's truth."""

    def __init__(self, surrogate: Surrogate, weights_NK: np.ndarray, seed: int) -> None:
        self.surrogate, self.weights_NK, self.seed = surrogate, weights_NK, seed

    def curves(self, params: Sequence[Mapping[str, float]]) -> np.ndarray:
        """Return the perplexities of settings at every rung, without noise."""
        s = self.surrogate
        kernel = s._kernel(features(params), s.x_ND, s.theta)
        return np.asarray(np.exp(np.exp(s.mean_K + s.scale * kernel @ self.weights_NK)))

    def seen(self, params: Mapping[str, float], number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one trial's curve without and with the noise of its seed."""
        (true_K,) = self.curves([params])
        rng = np.random.default_rng([self.seed, number])
        return true_K, true_K * math.exp(rng.normal(0, SEED_NOISE))
