"""Freeze-thaw (Swersky et al., arXiv 1406.3896): an exact Gaussian process over (settings, share of the data)
says for each slot which trial goes on by a rung, or which new point begins. Pure: no study, no I/O.

N, M cells (places on curves), D settings, I trials and new points, C of them that can go on, P of these that
are compared in S samples of the joint posterior, K rungs. Points lie in the unit cube; values are losses in
nats, above 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLES, POOL = 128, 24
STEPS = 8  # of L-BFGS, from where the last fit ended
GROWTH = 1.2  # the process is fitted again once there are so many times as many values
FALL = 3.0  # standard deviations from the first rung to the last, where all is promised
CLIP = 3.0  # where diverged values are cut: so many distances from best to median above the median
JITTER = 1e-6


@dataclass(frozen=True)
class Curves:
    """Trials so far, by number. A promise, 0 to 1, is how good the settings should be by what is known
    before. A value is nan where the bare base was measured."""

    points: list[Sequence[float]] = field(default_factory=list)
    promises: list[float] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)


class Cells(NamedTuple):
    """Places on curves: settings, log share of the data, whose curve."""

    x_ND: Tensor
    share_N: Tensor
    who_N: Tensor


def prior(num_settings: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of theta, the logarithms of: the lengths of settings, that of the
    log share, and the standard deviations of what `covariance` adds, in its order, and of the noise."""
    means = [0.4] * num_settings + [1.5, 1.0, 0.5, 0.7, 0.05, 0.03]
    spread = [0.7] * num_settings + [0.5] + [0.7] * 5
    return torch.tensor(means).double().log(), torch.tensor(spread).double()


def covariance(theta: Tensor, a: Cells, b: Cells) -> Tensor:
    """Return that of values without noise: what settings are worth (squared exponential), how that changes
    (Matern 5/2 over the log share), the mean curve, a level of each trial's own, and a constant."""
    D = a.x_ND.shape[1]
    worth, change, curve, level, _ = (2 * theta[D + 1 :]).exp()
    squares_NMD = (a.x_ND[:, None] - b.x_ND[None]) ** 2
    kx = torch.exp(-0.5 * (squares_NMD @ (-2 * theta[:D]).exp()))
    gaps = math.sqrt(5) * (a.share_N[:, None] - b.share_N[None]).abs() / theta[D].exp()
    kt = (1 + gaps + gaps**2 / 3) * torch.exp(-gaps)
    same = (a.who_N[:, None] == b.who_N[None]).double()
    found: Tensor = kx * (worth + change * kt) + curve * kt + level * same + 1
    return found


def factored(theta: Tensor, known: Cells) -> Tensor:
    """Return the Cholesky factor of the covariance with noise."""
    noise = (2 * theta[-1]).exp() + JITTER
    covariance_NN = covariance(theta, known, known) + noise * torch.eye(len(known.who_N)).double()
    factor: Tensor = torch.linalg.cholesky(covariance_NN)
    return factor


def cost(theta: Tensor, known: Cells, y_N: Tensor) -> Tensor:
    """Return the negative log of likelihood times prior, up to a constant."""
    mean, spread = prior(known.x_ND.shape[1])
    factor = factored(theta, known)
    half_N1 = torch.linalg.solve_triangular(factor, y_N[:, None], upper=False)
    off = (theta - mean) / spread
    found: Tensor = factor.diagonal().log().sum() + 0.5 * (half_N1**2).sum() + 0.5 * (off**2).sum()
    return found


def fit(theta: Tensor, known: Cells, y_N: Tensor) -> Tensor:
    """Return theta after some steps towards the lowest cost."""
    moving = theta.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([moving], max_iter=STEPS, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        now = cost(moving, known, y_N)
        now.backward()
        return now

    optimizer.step(step)
    return moving.detach()


class Posterior:
    """The process after what was measured."""

    def __init__(self, theta: Tensor, known: Cells, y_N: Tensor) -> None:
        self.theta, self.known = theta, known
        self.factor = factored(theta, known)
        self.solved_N1 = torch.cholesky_solve(y_N[:, None], self.factor)

    def at(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """Return the means of cells, and L^-1 K: its squares, summed over N, are what was learnt of them."""
        cross_MN = covariance(self.theta, cells, self.known)
        learnt_NM = torch.linalg.solve_triangular(self.factor, cross_MN.T, upper=False)
        return (cross_MN @ self.solved_N1)[:, 0], learnt_NM

    def marginal(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations."""
        mean_M, learnt_NM = self.at(cells)
        variance = 1 + (2 * self.theta[-5:-1]).exp().sum()
        return mean_M, (variance - (learnt_NM**2).sum(0)).clamp_min(JITTER).sqrt()

    def samples(self, cells: Cells, generator: torch.Generator) -> Tensor:
        """Return joint samples, [M, S]."""
        mean_M, learnt_NM = self.at(cells)
        joint_MM = covariance(self.theta, cells, cells) - learnt_NM.T @ learnt_NM
        root_MM = torch.linalg.cholesky(joint_MM + 1e-5 * torch.eye(len(mean_M)).double())
        noise_MS = torch.randn(len(mean_M), SAMPLES, generator=generator, dtype=torch.float64)
        found: Tensor = mean_M[:, None] + root_MM @ noise_MS
        return found


class FreezeThaw:
    """Chooses what trains next. ``num_rungs``: those of a full trial."""

    def __init__(self, num_settings: int, num_rungs: int, seed: int) -> None:
        self.theta, self.num_fitted = prior(num_settings)[0], 0
        self.generator = torch.Generator().manual_seed(seed)
        self.share_K = torch.log(torch.arange(1, num_rungs + 1).double() / num_rungs)
        self.fall_K = FALL * (1 - self.share_K / self.share_K[0])

    def choose(
        self, curves: Curves, new: Sequence[Sequence[float]], promises: Sequence[float], slots: int
    ) -> list[int]:
        """Return what trains in each slot up to its next rung: the number of a trial or, counted on from
        these, the index of a new point. Until a trial has finished, the best keep half of the slots. There
        must be two values, and no fewer candidates than slots."""
        trained_I = torch.tensor([len(values) for values in curves.values] + [0] * len(new))
        x_ID = torch.tensor([*curves.points, *new], dtype=torch.float64)
        promise_I = torch.tensor([*curves.promises, *promises], dtype=torch.float64)
        best, posterior = self._learn(curves, x_ID, promise_I)
        open_C = (trained_I < len(self.share_K)).nonzero()[:, 0]
        cost_CK = torch.arange(1, len(self.share_K) + 1) - trained_I[open_C, None]
        fall_CK = self.fall_K * promise_I[open_C, None]
        mean_CK, sd_CK = (one.view(cost_CK.shape) for one in posterior.marginal(self._cells(open_C, x_ID)))
        gain_CK = improvement(best, mean_CK - fall_CK, sd_CK)
        rate_C = (gain_CK / cost_CK.clamp_min(1) * (cost_CK > 0)).amax(1)
        leading = (open_C[:, None] == torch.tensor(self._leaders(curves, slots // 2))[None]).any(1)
        pool_P = (rate_C + 1e9 * leading).topk(min(POOL, len(rate_C))).indices
        samples = posterior.samples(self._cells(open_C[pool_P], x_ID), self.generator)
        y_PKS = samples.view(len(pool_P), len(self.share_K), SAMPLES) - fall_CK[pool_P, :, None]
        y_PKS = y_PKS.masked_fill(cost_CK[pool_P, :, None] < 1, math.inf).cummin(1).values
        first = [int(p) for p in leading[pool_P].nonzero()[:, 0]]
        picks = share_out(best, y_PKS, cost_CK[pool_P].clamp_min(1), rate_C[pool_P], first, slots)
        return [int(open_C[pool_P[pick]]) for pick in picks]

    def _learn(self, curves: Curves, x_ID: Tensor, promise_I: Tensor) -> tuple[Tensor, Posterior]:
        """Return the best value in standard units, and the process of how far values exceed the promise."""
        rows = [(i, k, v) for i, values in enumerate(curves.values) for k, v in enumerate(values)]
        told = [row for row in rows if not math.isnan(row[2])]
        who_N, rung_N = (torch.tensor(column) for column in list(zip(*told, strict=True))[:2])
        y_N = torch.tensor([value for _, _, value in told], dtype=torch.float64).log()
        y_N = y_N.clamp_max(y_N.median() + CLIP * (y_N.median() - y_N.min()).clamp_min(1e-3))
        y_N = (y_N - y_N.mean()) / y_N.std().clamp_min(JITTER)
        known = Cells(x_ID[who_N], self.share_K[rung_N], who_N)
        more_N = y_N + self.fall_K[rung_N] * promise_I[who_N]
        if len(told) >= GROWTH * self.num_fitted:
            self.theta, self.num_fitted = fit(self.theta, known, more_N), len(told)
        return y_N.min(), Posterior(self.theta, known, more_N)

    def _cells(self, who_C: Tensor, x_ID: Tensor) -> Cells:
        """Return all rungs of some trials."""
        who_N = who_C.repeat_interleave(len(self.share_K))
        return Cells(x_ID[who_N], self.share_K.repeat(len(who_C)), who_N)

    def _leaders(self, curves: Curves, most: int) -> list[int]:
        told = {i: [v for v in vs if not math.isnan(v)] for i, vs in enumerate(curves.values)}
        most *= all(len(values) < len(self.share_K) for values in curves.values)
        return sorted((i for i in told if told[i]), key=lambda i: min(told[i]))[:most]


def share_out(
    best: Tensor, y_PKS: Tensor, cost_PK: Tensor, rate_P: Tensor, first: Sequence[int], slots: int
) -> list[int]:
    """Return who gets the slots: `first`, then who improves most per rung, by samples of the lowest value up
    to each rung, on the best so far and on what those before find in the same sample."""
    best_S, chosen = best.expand(SAMPLES), list[int]()
    while len(chosen) < slots:
        rate_PK = (best_S - y_PKS).clamp_min(0).mean(2) / cost_PK + 1e-9 * rate_P[:, None]
        rate_PK[chosen] = -1
        pick, rung = divmod(int(rate_PK.argmax()), rate_PK.shape[1])
        if len(chosen) < len(first):
            pick, rung = first[len(chosen)], -1
        best_S = torch.minimum(best_S, y_PKS[pick, rung])
        chosen.append(pick)
    return chosen


def improvement(best: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """Return by how much normal values are expected to lie below the best (0 where above)."""
    z = (best - mean) / sd
    found: Tensor = sd * (z * torch.special.ndtr(z) + torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi))
    return found
