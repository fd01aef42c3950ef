"""Forecasts the tokens and time of a sweep from the measurements of a probe. Pure: no torch, no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from optuna import create_study
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from lora_search.search.pruning import RungPruner, ThawPruner
from lora_search.search.sampling import suggest
from lora_search.settings.space import Space

DRAWS = 40  # simulated sweeps
# Shares of all rungs that pruner=freeze_thaw trains, by number of trials: least, mean and most of 18
# simulated sweeps in 4 slots, three tasks of each family of docs/pruning.md.
THAWED = {1: (1.0, 1.0, 1.0), 4: (0.83, 0.91, 1.0), 6: (0.71, 0.79, 0.92), 10: (0.42, 0.67, 0.80),
          20: (0.25, 0.51, 0.68), 40: (0.21, 0.42, 0.59)}  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """The measurements of a short probe: speeds of a worker with all slots busy."""

    train_tokens_per_second: float
    eval_seconds: float  # of one trial at one rung, packed with the others
    setup_seconds: float  # until training starts
    final_seconds: float = 0.0  # to score winner and base on the test split


@dataclass(frozen=True)
class Shape:
    """The size of a sweep."""

    num_trials: int
    num_workers: int
    num_slots: int
    num_rungs: int  # of a trial of mean length
    trial_tokens: float


@dataclass(frozen=True)
class Forecast:
    """The forecast of a sweep: least, expected and most, depending on how much is pruned."""

    trial_tokens: float
    trial_seconds: float  # of a worker with all slots busy
    tokens: tuple[float, float, float]
    seconds: tuple[float, float, float]
    training_share: float  # of the time; evaluation takes the rest


def forecast(shape: Shape, probe: Probe, shares: tuple[float, float, float]) -> Forecast:
    """Return tokens and wall time of the sweep if it trains these shares of all its rungs."""
    training = shape.trial_tokens / probe.train_tokens_per_second
    trial_seconds = training + shape.num_rungs * probe.eval_seconds
    least, expected, most = (share * shape.num_trials for share in shares)
    wall, once = trial_seconds / shape.num_workers, probe.setup_seconds + probe.final_seconds
    return Forecast(
        trial_tokens=shape.trial_tokens,
        trial_seconds=trial_seconds,
        tokens=(least * shape.trial_tokens, expected * shape.trial_tokens, most * shape.trial_tokens),
        seconds=tuple(once + count * wall for count in (least, expected, most)),  # type: ignore[arg-type]
        training_share=training / trial_seconds,
    )


def trials_within(seconds: float, shape: Shape, probe: Probe, share: float, trial_seconds: float) -> int:
    """Return how many trials finish or are pruned within this wall time."""
    left = max(0.0, seconds - probe.setup_seconds)
    return int(left * shape.num_workers / (share * trial_seconds))


def shares_trained(pruner: BasePruner, shape: Shape, seed: int) -> tuple[float, float, float]:
    """Return the share of all rungs that is trained: least, mean and most over many simulated sweeps.

    They draw the order of the trials at random, and the curves keep their order from the first rung on: the
    rung rule needs no more. That of ``pruner=freeze_thaw`` is measured; for other rules the range is from one
    rung per trial to all rungs.
    """
    if isinstance(pruner, NopPruner):
        return 1.0, 1.0, 1.0
    if isinstance(pruner, ThawPruner):
        least, mean, most = (_thawed(i, shape) for i in range(3))
        return least, mean, most
    if not isinstance(pruner, RungPruner):
        return 1 / shape.num_rungs, 1.0, 1.0
    rng = np.random.default_rng(seed)
    num_slots = shape.num_slots * shape.num_workers
    found = [
        _share(pruner, rng.permutation(shape.num_trials).tolist(), num_slots, shape.num_rungs)
        for _ in range(DRAWS)
    ]
    return min(found), float(np.mean(found)), max(found)


def _thawed(place: int, shape: Shape) -> float:
    shares = [float(found[place]) for found in THAWED.values()]
    share = float(np.interp(np.log(shape.num_trials), np.log(list(THAWED)), shares))
    return max(share, 1 / shape.num_rungs)


def _share(rule: RungPruner, order: Sequence[int], num_slots: int, num_rungs: int) -> float:
    """Return the share of the rungs that is trained if trial i is the order[i]-th best."""
    trials: list[FrozenTrial] = []
    trained = 0
    while True:
        running = [t for t in trials if t.state == TrialState.RUNNING]
        while len(running) < num_slots and len(trials) < len(order):
            trials.append(_running(len(trials)))
            running.append(trials[-1])
        if not running:
            return trained / (num_rungs * len(order))
        for trial in running:
            rung = (trial.last_step or 0) + 1
            trial.intermediate_values[rung] = 1.0 + order[trial.number]
            trial.state = TrialState.COMPLETE if rung == num_rungs else trial.state
        trained += len(running)
        judged = [t for t in running if t.state == TrialState.RUNNING]
        for number in rule.losers(trials, judged):
            trials[number].state = TrialState.PRUNED


def _running(number: int) -> FrozenTrial:
    return FrozenTrial(
        number=number, trial_id=number, state=TrialState.RUNNING, value=None, datetime_start=None,
        datetime_complete=None, params={}, distributions={}, user_attrs={}, system_attrs={},
        intermediate_values={},
    )  # fmt: skip


def drawn_params(space: Space, count: int, seed: int) -> list[dict[str, object]]:
    """Return random points of the space."""
    study = create_study(sampler=RandomSampler(seed=seed))
    trials = [study.ask() for _ in range(count)]
    for trial in trials:
        suggest(trial, space)
    return [dict(trial.params) for trial in trials]
