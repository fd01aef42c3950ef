"""Freeze-thaw (Swersky et al., arXiv 1406.3896): an exact Gaussian process over (settings, share of the data)
says for each slot which trial goes on by a rung, or which new point begins. Pure: no study, no I/O.

N, M cells (places on curves), D settings, I trials and new points, C of them that can go on, P of these that
are compared in S samples of the joint posterior, K rungs. Points lie in the unit cube; values are losses in
nats, above 0.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLES, POOL = 128, 24
STEPS = 8  # of L-BFGS, from where the last fit ended
GROWTH = 1.2  # the process is fitted again once there are so many times as many values
FALL = 3.0  # standard deviations from the first rung to the last, where all is promised
CLIP = 3.0  # where diverged values are cut: so many distances from best to median above the median
JITTER = 1e-6
MOST_CELLS = 500  # that the process is conditioned on: its cost grows with their cube


@dataclass(frozen=True)
class Curves:
    """Trials so far, by number. A promise, 0 to 1, is how good the settings should be by what is known
    before. A value is nan where the bare base was measured, infinite where training diverged. Lengths are in
    rungs; without them all trials have as many as the longest."""

    points: list[Sequence[float]] = field(default_factory=list)
    promises: list[float] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


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


def root_of(covariance_NN: Tensor, jitter: Tensor | float) -> Tensor:
    """Return the Cholesky factor of a covariance with so much more on its diagonal, ten times as much
    where rounding asks for it. Where it is not finite, nor is the factor."""
    eye_NN = torch.eye(len(covariance_NN), dtype=torch.float64)
    while True:
        raised_NN = covariance_NN + jitter * eye_NN
        factor_NN, failed = torch.linalg.cholesky_ex(raised_NN)
        if not failed or not raised_NN.isfinite().all():
            found: Tensor = factor_NN
            return found
        jitter = 10 * jitter


def factored(theta: Tensor, known: Cells) -> Tensor:
    """Return the Cholesky factor of the covariance with noise."""
    return root_of(covariance(theta, known, known), (2 * theta[-1]).exp() + JITTER)


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
    found = moving.detach()
    return found if bool(cost(found, known, y_N) < cost(theta, known, y_N)) else theta


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
        root_MM = root_of(joint_MM, 1e-5)
        noise_MS = torch.randn(len(mean_M), SAMPLES, generator=generator, dtype=torch.float64)
        found: Tensor = mean_M[:, None] + root_MM @ noise_MS
        return found


class Places(NamedTuple):
    """Trials and new points, with the places that each has on its curve; K those of the longest trial. What
    is promised falls with the share of the data."""

    x_ID: Tensor
    trained_I: Tensor  # rungs
    length_I: Tensor
    share_IK: Tensor
    promised_IK: Tensor

    def cells(self, who_C: Tensor) -> Cells:
        """Return all places of some trials."""
        who_N = who_C.repeat_interleave(self.share_IK.shape[1])
        return Cells(self.x_ID[who_N], self.share_IK[who_C].flatten(), who_N)


def places_of(
    curves: Curves, new: Sequence[Sequence[float]], promises: Sequence[float], num_rungs: int
) -> Places:
    """Return trials, then new points; these have all rungs."""
    values = [*curves.values, *([] for _ in new)]
    lengths = [*(curves.lengths or [num_rungs] * len(curves.values)), *[num_rungs] * len(new)]
    promise_I = torch.tensor([*curves.promises, *promises], dtype=torch.float64)
    rungs_K, length_I = torch.arange(1, num_rungs + 1), torch.tensor(lengths)
    share_IK = torch.log(rungs_K.double() / length_I[:, None])
    fall_IK = FALL * (1 + share_IK / math.log(num_rungs)) if num_rungs > 1 else 0 * share_IK
    return Places(
        torch.tensor([*curves.points, *new], dtype=torch.float64),
        torch.tensor([len(one) for one in values]),
        length_I,
        share_IK,
        fall_IK * promise_I[:, None],
    )


class FreezeThaw:
    """Chooses what trains next. ``num_rungs``: those of the longest trial."""

    def __init__(self, num_settings: int, num_rungs: int, seed: int) -> None:
        self.theta, self.num_fitted = prior(num_settings)[0], 0
        self.generator = torch.Generator().manual_seed(seed)
        self.num_rungs = num_rungs

    @property
    def fitted(self) -> list[float]:
        """What `recall` needs to go on as if it were this object: how many values were fitted, and theta."""
        return [float(self.num_fitted), *self.theta.tolist()]

    def recall(self, fitted: Sequence[float]) -> None:
        """Go on from what was fitted, unless it was for other settings."""
        if len(fitted) == 1 + len(self.theta):
            self.num_fitted, self.theta = int(fitted[0]), torch.tensor(fitted[1:], dtype=torch.float64)

    def choose(
        self,
        curves: Curves,
        new: Sequence[Sequence[float]],
        promises: Sequence[float],
        slots: int,
        *,
        able: Sequence[int] | None = None,
        running: Sequence[int] = (),
        worth: float = 0.0,
    ) -> list[int]:
        """Return what trains in each slot up to its next rung: the number of a trial or, counted on from
        these, the index of a new point. Until a trial has finished, the best keep half of the slots. There
        must be two values.

        ``able``: the trials that can go on, all by default; ``running``: those that train in other slots.
        ``worth``: once a trial has finished, nothing is chosen that is not expected to lower the best
        perplexity by this share.
        """
        known = range(len(curves.values))
        places = places_of(curves, new, promises, self.num_rungs)
        best, share, posterior = self._learn(curves, places)
        going = [n for n in (known if able is None else able) if places.trained_I[n] < places.length_I[n]]
        open_C = torch.tensor([*running, *going, *range(len(known), len(places.x_ID))], dtype=torch.long)
        if not len(open_C):
            return []
        cost_CK, gain_CK = gains(places, posterior, best, open_C)
        rate_C = (gain_CK / cost_CK.clamp_min(1)).amax(1)
        most = (len(running) + slots) // 2 if not has_finished(curves, places) else 0
        is_seated_C = torch.arange(len(open_C)) < len(running)
        leads_C = torch.isin(open_C, leaders(curves, [*running, *going], most)) & ~is_seated_C
        pool_P = (rate_C + 1e9 * leads_C + 1e18 * is_seated_C).topk(min(POOL, len(rate_C))).indices
        y_PKS = self._sampled(places, posterior, open_C[pool_P], cost_CK[pool_P])
        seated, first = is_seated_C[pool_P].nonzero()[:, 0], leads_C[pool_P].nonzero()[:, 0]
        picks = share_out(
            best, y_PKS, cost_CK[pool_P].clamp_min(1), rate_C[pool_P], [*seated.tolist(), *first.tolist()],
            min(len(seated) + slots, len(pool_P)),
        )  # fmt: skip
        chosen_C = pool_P[picks[len(seated) :]]
        is_worth_C = (gain_CK.amax(1) * share >= worth) | (not has_finished(curves, places))
        return [int(n) for n in open_C[chosen_C[is_worth_C[chosen_C]]]]

    def _learn(self, curves: Curves, places: Places) -> tuple[Tensor, float, Posterior]:
        """Return the best value in standard units, the share of the best perplexity that is one of them, and
        the process of how far values exceed the promise."""
        who, rung, nats = zip(*told_cells(curves), strict=True)
        who_N, rung_N = torch.tensor(who), torch.tensor(rung)
        y_N = torch.tensor(nats, dtype=torch.float64).log()
        y_N = y_N.clamp_max(y_N.median() + CLIP * (y_N.median() - y_N.min()).clamp_min(1e-3))
        sd = y_N.std().clamp_min(JITTER)
        share = float(sd * y_N.min().exp())
        y_N = (y_N - y_N.mean()) / sd
        known = Cells(places.x_ID[who_N], places.share_IK[who_N, rung_N], who_N)
        more_N = y_N + places.promised_IK[who_N, rung_N]
        if len(y_N) >= GROWTH * self.num_fitted:
            self.theta, self.num_fitted = fit(self.theta, known, more_N), len(y_N)
        return y_N.min(), share, Posterior(self.theta, known, more_N)

    def _sampled(self, places: Places, posterior: Posterior, who_P: Tensor, cost_PK: Tensor) -> Tensor:
        """Return joint samples of the lowest value from now up to each rung, [P, K, S]."""
        samples = posterior.samples(places.cells(who_P), self.generator)
        y_PKS = samples.view(*cost_PK.shape, SAMPLES) - places.promised_IK[who_P, :, None]
        return y_PKS.masked_fill(~is_ahead(places, who_P, cost_PK)[:, :, None], math.inf).cummin(1).values


def gains(places: Places, posterior: Posterior, best: Tensor, who_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many rungs trials have to train to each place, and by how much they are expected to be below
    the best there, [C, K]; 0 where they have been and beyond their end."""
    cost_CK = torch.arange(1, places.share_IK.shape[1] + 1) - places.trained_I[who_C, None]
    mean_CK, sd_CK = (one.view(cost_CK.shape) for one in posterior.marginal(places.cells(who_C)))
    gain_CK = improvement(best, mean_CK - places.promised_IK[who_C], sd_CK)
    return cost_CK, gain_CK * is_ahead(places, who_C, cost_CK)


def is_ahead(places: Places, who_C: Tensor, cost_CK: Tensor) -> Tensor:
    return (cost_CK > 0) & (places.trained_I[who_C, None] + cost_CK <= places.length_I[who_C, None])


def has_finished(curves: Curves, places: Places) -> bool:
    return any(len(vs) >= int(length) for vs, length in zip(curves.values, places.length_I, strict=False))


def leaders(curves: Curves, among: Sequence[int], most: int) -> Tensor:
    """Return the best of these trials, which have been measured."""
    measured = {i: value for i in sorted(among) if (value := lowest(curves.values[i])) < math.inf}
    return torch.tensor(sorted(measured, key=lambda i: measured[i])[:most], dtype=torch.long)


def lowest(values: Sequence[float]) -> float:
    return min((value for value in values if not math.isnan(value)), default=math.inf)


def told_cells(curves: Curves) -> list[tuple[int, int, float]]:
    """Return trial, rung - 1 and value of what was measured, at most MOST_CELLS: beyond that the whole curves
    of the best trials, first and last values of the next best, and of an even share of the others."""
    told = [[(i, k, v) for k, v in enumerate(vs) if not math.isnan(v)] for i, vs in enumerate(curves.values)]
    told = [cells for cells in told if cells]
    if sum(map(len, told)) <= MOST_CELLS:
        return [cell for cells in told for cell in cells]
    told.sort(key=lambda cells: min(value for _, _, value in cells))
    lengths = list(accumulate(map(len, told)))
    num_whole = bisect_right(lengths, MOST_CELLS // 2)
    others = [[cells[0], cells[-1]][: len(cells)] for cells in told[num_whole:]]
    stride = math.ceil(2 * len(others) / (MOST_CELLS // 2))
    return sorted(cell for cells in [*told[:num_whole], *others[::stride]] for cell in cells)


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
