"""Replays known validation curves through the rung rule: slots, refill, one rung a tick. No study here."""

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from lora_search.search.pruning import RungPruner, Standings


def make_trial(number: int, values: Sequence[float], state: TrialState = TrialState.RUNNING) -> FrozenTrial:
    """Return a trial with one value per rung so far."""
    return FrozenTrial(
        number=number, trial_id=number, state=state, value=None, datetime_start=None, datetime_complete=None,
        params={}, distributions={}, user_attrs={}, system_attrs={},
        intermediate_values=dict(enumerate(values, 1)),
    )  # fmt: skip


@dataclass(frozen=True)
class Replay:
    states: tuple[TrialState, ...]  # by place in the queue
    num_rungs: int  # trained in all
    num_resumed: int


def replay(curves: Sequence[Sequence[float]], slots: int, rule: RungPruner | None, resume: bool) -> Replay:
    """Train the curves in order; without a rule all of them to their end."""
    queue = [make_trial(number, ()) for number in range(len(curves))]
    begun: list[FrozenTrial] = []
    num_rungs = num_resumed = 0
    while True:
        running = [t for t in begun if t.state == TrialState.RUNNING]
        while len(running) < slots and (found := _next(queue, begun, rule, resume)) is not None:
            num_resumed += found.last_step is not None
            found.state = TrialState.RUNNING
            running.append(found)
        if not running:
            return Replay(tuple(t.state for t in begun), num_rungs, num_resumed)
        for trial in running:
            rung = (trial.last_step or 0) + 1
            trial.intermediate_values[rung] = curves[trial.number][rung - 1]
            trial.state = TrialState.COMPLETE if rung == len(curves[trial.number]) else trial.state
        num_rungs += len(running)
        judged = [t for t in running if t.state == TrialState.RUNNING]
        for number in rule.losers(begun, judged) if rule else ():
            begun[number].state = TrialState.PRUNED


def _next(
    queue: list[FrozenTrial], begun: list[FrozenTrial], rule: RungPruner | None, resume: bool
) -> FrozenTrial | None:
    """Return the next trial as the study does: one to take up again, else a new one."""
    if rule is not None and resume:
        standings = Standings(rule)
        for trial in begun:
            standings.put(trial)
        lifted = standings.promotable([t for t in begun if t.state == TrialState.PRUNED])
        if lifted:
            return lifted[0]
    if len(begun) < len(queue):
        begun.append(queue[len(begun)])
        return begun[-1]
    return None
