"""`pruner=freeze_thaw`: what trains next in each slot of a study, from its trials and its seed alone.

The rule is in `freeze_thaw`, which needs torch and is imported when the first decision is due. What it has
fitted is kept in the study, so that a study decides as it would have without an interruption.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lora_search.search.points import Axes, untried
from lora_search.search.priors import LR, prior_rates
from lora_search.search.trials import params_of, progress_of, text_of
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import Space, largest
from lora_search.trial import draw_seed

NEW = 100  # random points that are compared with the paused trials
RATE_SPREAD = 1.5  # nats around the prior's learning rate within which much is promised
LEAST_NATS = 1e-6  # of a loss whose logarithm is taken
# Once no new trial may begin, a trial goes on if it is expected to lower the best perplexity by this share:
# less than half of what two seeds of the same settings differ by (0.25 %, docs/pruning.md).
WORTH = 0.001
DIVERGED = "diverged"  # how the reason of a trial begins that did
Params = Mapping[str, object]


class Curve(NamedTuple):
    """A trial as the rule sees it; values in nats."""

    params: Params
    point: list[float]
    promise: float
    values: list[float]
    length: int  # in rungs


class Memory(NamedTuple):
    """How what was fitted is kept in the study: a list of numbers."""

    read: Callable[[], list[float] | None]
    write: Callable[[list[float]], None]


class Thaw:
    """Decides for one study. ``base_width`` is that of the model, None where it is not known."""

    def __init__(self, config: SweepConfig, space: Space, base_width: float | None, memory: Memory) -> None:
        self.config, self.space, self.memory = config, space, memory
        self.axes = Axes(space)
        self.num_rungs = largest(config, space, "train.epochs") * config.train.evals_per_epoch
        self._rate = prior_rates(base_width)[0] if base_width and LR in space.expressions else None
        self._ended: dict[int, Curve] = {}

    def add(self, trial: FrozenTrial) -> None:
        """Take a trial that has finished."""
        self._ended[trial.number] = self._curve(trial)

    def choose(
        self, unfinished: Sequence[FrozenTrial], able: Sequence[int], slots: int, room: int, number: int
    ) -> list[int | Params]:
        """Return what trains in so many slots up to its next rung, the most promising first: numbers of the
        trials that are ``able`` to, and settings of new ones.

        ``unfinished``: paused ones as PRUNED; those that run and are not able train in other slots. ``room``:
        how many new trials may begin; those that wait begin first. ``number``: that of the next trial.
        """
        curves = self._ended | {t.number: self._curve(t) for t in unfinished if params_of(t)}
        values = [value for curve in curves.values() for value in curve.values]
        seed = draw_seed(self.config.seed, number, len(values))
        tried = [curve.params for curve in curves.values()]
        waits = any(t.state == TrialState.WAITING for t in unfinished)
        is_open = room > 0 and not waits
        new = untried(self.space, NEW, tried, np.random.default_rng(seed)) if is_open else []
        if sum(math.isfinite(value) for value in values) < 2:
            return list[int | Params]([*able, *new])[:slots]
        running = {t.number for t in unfinished if t.state == TrialState.RUNNING} - set(able)
        worth = 0.0 if new or waits else WORTH
        return self._chosen(
            dict(sorted(curves.items())), new, able, running & curves.keys(), slots, worth, seed
        )

    def _chosen(
        self, curves: Mapping[int, Curve], new: Sequence[Params], able: Sequence[int],
        running: Collection[int], slots: int, worth: float, seed: int,
    ) -> list[int | Params]:  # fmt: skip
        from lora_search.search.freeze_thaw import Curves, FreezeThaw

        points, promises = [self.axes.point(p) for p in new], [self._promise(p) for p in new]
        numbers, known = list(curves), list(curves.values())
        told = Curves(
            [one.point for one in known], [one.promise for one in known], [one.values for one in known],
            [one.length for one in known],
        )  # fmt: skip
        rule = FreezeThaw(len(self.axes.point({})), self.num_rungs, seed)
        rule.recall(before := self.memory.read() or [])
        picks = rule.choose(
            told, points, promises, slots, able=[numbers.index(n) for n in sorted(able)],
            running=[numbers.index(n) for n in sorted(running)], worth=worth,
        )  # fmt: skip
        if rule.fitted != before:
            self.memory.write(rule.fitted)
        return [numbers[i] if i < len(numbers) else new[i - len(numbers)] for i in picks]

    def _curve(self, trial: FrozenTrial) -> Curve:
        params, bare = params_of(trial), progress_of(trial)["untrained_rung"]
        epochs = params.get("train.epochs", self.config.train.epochs)
        assert isinstance(epochs, int | float)
        length = min(self.num_rungs, int(epochs) * self.config.train.evals_per_epoch)
        seen = [
            trial.intermediate_values.get(rung, math.nan) for rung in range(1, (trial.last_step or 0) + 1)
        ]
        values = [nats(value) if rung > bare else math.nan for rung, value in enumerate(seen, 1)][:length]
        if text_of(trial, "reason").startswith(DIVERGED):
            values = [*values, math.inf][:length]
        length = len(values) if trial.state == TrialState.COMPLETE else length
        return Curve(params, self.axes.point(params), self._promise(params), values, length)

    def _promise(self, params: Params) -> float:
        """Return how good settings should be by the learning rate that the first trials are computed from."""
        rate = params.get(LR, self.config.optim.lr)
        if self._rate is None or not isinstance(rate, int | float) or rate <= 0:
            return 0.0
        return math.exp(-0.5 * (math.log(rate / self._rate) / RATE_SPREAD) ** 2)


def nats(perplexity: float) -> float:
    """Return the loss of a perplexity, above 0; infinity if training diverged."""
    if math.isnan(perplexity):
        return perplexity
    return max(LEAST_NATS, math.log(perplexity)) if perplexity > 0 else LEAST_NATS
