"""One worker's view of the study. An update costs only as much as the new trials: finished trials never
change, so each is read once. Paused trials count as pruned."""

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping, Sequence

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lora_search.search.pruning import RungPruner, Standings
from lora_search.search.trials import (
    Cursor,
    best_until,
    identity_of,
    never_began,
    point_of,
    progress_of,
    settings_of,
    settled,
)
from lora_search.trial import Limit, StudySummary


class Ledger:
    """Counts, best trial and tried points, as of the last ``read``."""

    def __init__(self, study: Study) -> None:
        self._cursor = Cursor(study)
        self._unfinished: dict[int, FrozenTrial] = {}
        self.open: list[FrozenTrial] = []  # unfinished, by number; paused ones as PRUNED
        self.standings = Standings(study.pruner) if isinstance(study.pruner, RungPruner) else None
        self._counts: Counter[TrialState] = Counter()  # of finished trials that began
        self._failed: list[int] = []  # sorted numbers
        self._tried: dict[frozenset[object], int] = {}  # params -> lowest number
        self._best = (math.inf, -1)
        self._tokens = 0  # trained by finished trials

    def read(self, *, everything: bool = False) -> None:
        """Update from the database; see ``Cursor.read`` for ``everything``."""
        finished, unfinished = self._cursor.read(everything=everything)
        for trial in finished:
            self._take(trial)
        self._unfinished = {t.number: t for t in unfinished}
        self.open = [settled(t) for t in unfinished]

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials by number, from 0 without gaps, as of the last read of everything."""
        return self._cursor.trials

    def find(self, number: int) -> FrozenTrial:
        """Return one trial."""
        return self._unfinished[number] if number in self._unfinished else self.trials[number]

    def count(self, *states: TrialState) -> int:
        """Return the number of trials that began and are in one of these states."""
        return sum(self._counts[state] for state in states) + sum(t.state in states for t in self.open)

    @property
    def tokens(self) -> int:
        """The tokens that all trials have trained, each up to its last rung."""
        return self._tokens + sum(int(progress_of(t)["train_tokens"]) for t in self.open)

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

    def first_with(self, params: Mapping[str, object], before: int) -> int | None:
        """Return the first trial with these parameters that has not failed and either has a lower number or
        has begun: an enqueued trial may be claimed after a later one."""
        identity = point_of(params)
        rivals = [t for t in self.open if t.number < before or settings_of(t)]
        same = [t.number for t in rivals if identity_of(t) == identity]
        if identity in self._tried:
            same.append(self._tried[identity])
        return min((number for number in same if number != before), default=None)

    def num_not_failed(self, before: int) -> int:
        """Return the number of trials with lower numbers that have not failed."""
        return before - bisect_left(self._failed, before)

    def _take(self, trial: FrozenTrial) -> None:
        self._tokens += progress_of(trial)["train_tokens"]
        if not never_began(trial):
            self._counts[trial.state] += 1
        if trial.state == TrialState.FAIL:
            insort(self._failed, trial.number)
            return
        if self.standings is not None:
            self.standings.add(trial)
        identity = identity_of(trial)
        self._tried[identity] = min(trial.number, self._tried.get(identity, trial.number))
        was_measured = math.isfinite(best_until(trial, trial.last_step or 0))  # not only a value from outside
        if trial.state == TrialState.COMPLETE and trial.value is not None and was_measured:
            self._best = min(self._best, (trial.value, trial.number))
