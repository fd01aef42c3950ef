"""One worker's view of the study. An update costs only as much as what has changed, and so does a question:
sums are kept, not computed. Paused trials count as pruned."""

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from lora_search.search.pruning import RungPruner, Standings
from lora_search.search.trials import (
    best_until,
    identity_of,
    never_began,
    params_of,
    point_of,
    progress_of,
    settings_of,
    settled,
    text_of,
)
from lora_search.trial import Limit, StudySummary

Read = Callable[[Iterable[int]], Iterable[FrozenTrial]]  # `Changes.read`


class Ledger:
    """Counts, best trial and tried points, as of the last `read`."""

    def __init__(self, changes: Read, pruner: BasePruner) -> None:
        self._changes = changes
        self.num_trials = 0  # numbered from 0 without gaps
        self.last_reason = ""  # of the trial with the highest number
        self.points: dict[int, Mapping[str, object]] = {}  # number -> parameters
        self._open: dict[int, FrozenTrial] = {}  # unfinished, by number; paused ones as PRUNED
        self.standings = Standings(pruner) if isinstance(pruner, RungPruner) else None
        self._counts: Counter[TrialState] = Counter()  # without trials that were refused when they were drawn
        self._failed: list[int] = []  # sorted numbers
        self._tried: dict[
            frozenset[object], list[int]
        ] = {}  # parameters -> sorted numbers, without failed ones
        self._best = (math.inf, -1)
        self.tokens = 0  # that all trials have trained, each up to its last rung
        self.followers: list[Callable[[FrozenTrial], None]] = []  # called with each finished trial

    def read(self, held: Iterable[int] = ()) -> None:
        """Update from the database; read trials with the ids ``held`` whether they have changed or not."""
        for trial in self._changes(held):
            self._put(trial)

    @property
    def num_open(self) -> int:
        """The number of unfinished trials."""
        return len(self._open)

    @property
    def open(self) -> list[FrozenTrial]:
        """The unfinished trials, by number; paused ones as PRUNED."""
        return list(self._open.values())

    def find(self, number: int) -> FrozenTrial | None:
        """Return an unfinished trial; None if it has ended."""
        return self._open.get(number)

    def count(self, *states: TrialState) -> int:
        """Return the number of trials that began and are in one of these states."""
        return sum(self._counts[state] for state in states)

    def summary(self, n_trials: int | None, limits: Sequence[Limit] = ()) -> StudySummary:
        """Return the counts, the best COMPLETE trial and the limits."""
        perplexity, number = self._best
        complete, pruned = self.count(TrialState.COMPLETE), self.count(TrialState.PRUNED)
        return StudySummary(
            finished=complete + pruned,
            n_trials=n_trials,
            complete=complete,
            pruned=pruned,
            failed=self.count(TrialState.FAIL),
            running=self.count(TrialState.RUNNING),
            best_number=number if number >= 0 else None,
            best_perplexity=perplexity if number >= 0 else None,
            limits=tuple(limits),
        )

    @property
    def best_perplexity(self) -> float:
        """That of the best COMPLETE trial; infinity without one."""
        return self._best[0]

    def first_with(self, params: Mapping[str, object], before: int) -> int | None:
        """Return the first trial with these parameters that has not failed and either has a lower number or
        has begun: an enqueued trial may be claimed after a later one."""
        same = self._tried.get(point_of(params), ())
        return next((n for n in same if n < before or (n > before and self._has_begun(n))), None)

    def num_not_failed(self, before: int) -> int:
        """Return the number of trials with lower numbers that have not failed."""
        return before - bisect_left(self._failed, before)

    def _has_begun(self, number: int) -> bool:
        return number not in self._open or bool(settings_of(self._open[number]))

    def _put(self, trial: FrozenTrial) -> None:
        """Replace what is known of a trial."""
        is_over, old = trial.state.is_finished(), self._open.get(trial.number)
        trial = settled(trial)
        if old is not None:
            self._add(old, -1)
            self._tried[identity_of(old)].remove(old.number)
        self._add(trial, 1)
        if trial.number >= self.num_trials:
            self.num_trials = trial.number + 1
        if trial.number == self.num_trials - 1:
            self.last_reason = text_of(trial, "reason")
        self.points[trial.number] = params_of(trial)
        if self.standings is not None:
            self.standings.put(trial)
        if trial.state != TrialState.FAIL:
            insort(self._tried.setdefault(identity_of(trial), []), trial.number)
        if is_over:
            self._open.pop(trial.number, None)
            self._end(trial)
        else:
            self._open[trial.number] = trial

    def _add(self, trial: FrozenTrial, sign: int) -> None:
        self.tokens += sign * _tokens_of(trial)
        if trial.state != TrialState.FAIL or not never_began(trial):
            self._counts[trial.state] += sign

    def _end(self, trial: FrozenTrial) -> None:
        if trial.state == TrialState.FAIL:
            insort(self._failed, trial.number)
            return
        for follow in self.followers:
            follow(trial)
        was_measured = math.isfinite(best_until(trial, trial.last_step or 0))  # not only a value from outside
        if trial.state == TrialState.COMPLETE and trial.value is not None and was_measured:
            self._best = min(self._best, (trial.value, trial.number))


def _tokens_of(trial: FrozenTrial) -> int:
    tokens = progress_of(trial)["train_tokens"]
    return int(tokens) if math.isfinite(tokens) else 0
