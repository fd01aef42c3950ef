"""The trials that this worker holds, and every write to one of them.

Each write first checks, in the same transaction, that the trial still belongs to this worker. It changes no
trial that another worker has taken over or ended.
"""

import json
import math
from collections.abc import Mapping, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.trial_table import TrialTable
from lora_search.search.trials import (
    PAUSED,
    PROGRESS,
    SETTINGS,
    UNSIGNED,
    is_held_by,
    progress_after,
    progress_of,
    settings_of,
)
from lora_search.settings.overlay import trial_settings
from lora_search.settings.schema import SweepConfig
from lora_search.trial import Measurement, TrialSettings


class HeldTrials:
    """``last_rungs`` maps the number of each held trial to its last rung."""

    def __init__(self, config: SweepConfig, study: optuna.Study, table: TrialTable, worker: str) -> None:
        self.config, self.study, self.table, self.worker = config, study, table, worker
        self.last_rungs: dict[int, int] = {}

    def begin(self, number: int) -> tuple[TrialSettings, FrozenTrial] | None:
        """Begin a trial that was drawn; return its settings and its record. None if another worker has taken
        it over, or if another program has changed its parameters: then the trial fails."""
        with self.table.locked(number) as trial:
            if not self.has(trial.seen):
                return None
            settings = trial_settings(self.config, trial.seen.params)
            text = json.dumps(settings.record())
            if was_changed(settings_of(trial.seen), text):
                trial.write({"reason": "another program has changed its parameters"}, TrialState.FAIL)
                return None
            trial.keep(SETTINGS, text)
            trial.write({"reason": ""})
        self.last_rungs[number] = settings.num_rungs
        return settings, trial.seen

    def report(self, news: Mapping[int, Sequence[Measurement]]) -> dict[int, int]:
        """Write the measurements of trials in one transaction, each rung once. Return the tokens that each
        has trained since its last report, without trials that are another worker's."""
        trained: dict[int, int] = {}
        with self.table.all_locked(news) as trials:
            for number, trial in trials.items():
                if not self.has(trial.seen):
                    continue
                rungs = {m.rung: m.perplexity for m in reversed(news[number]) if math.isfinite(m.perplexity)}
                for rung in sorted(rungs.keys() - trial.seen.intermediate_values.keys()):
                    trial.report(rung, rungs[rung])
                progress = progress_after(trial.seen, news[number])
                trial.keep(PROGRESS, progress)
                trained[number] = progress["train_tokens"] - progress_of(trial.seen)["train_tokens"]
        return trained

    def note(self, number: int, attributes: Mapping[str, object]) -> None:
        """Store attributes of a trial."""
        with self.table.locked(number) as trial:
            if self.has(trial.seen):
                trial.write(attributes)

    def end(self, number: int, state: TrialState, reason: str, value: float | None = None) -> TrialState:
        """End a trial and return its state, which differs from ``state`` if another worker has taken it over.

        The trial is held until the write succeeds, so the call may be repeated after a database error.
        """
        with self.table.locked(number) as trial:
            if self.has(trial.seen):
                trial.write({"reason": reason}, state, value)
            else:
                state = trial.seen.state
        self.last_rungs.pop(number, None)
        return state

    def put_back(self, number: int, attributes: Mapping[str, object]) -> None:
        """Return a trial to the queue, unless it is paused."""
        with self.table.locked(number) as trial:
            if self.has(trial.seen) and not trial.seen.user_attrs.get(PAUSED):
                trial.write({**attributes, **UNSIGNED}, TrialState.WAITING)

    def put_back_all(self, reason: str) -> None:
        """Return every held trial to the queue, for the same command or another worker to continue."""
        for number in self.last_rungs:
            self.put_back(number, {"reason": reason})
        self.last_rungs.clear()

    def put_back_unheld(self) -> None:
        """Put back the trials that this worker signed in a claim that a database error interrupted."""
        for left in self._running():
            if left.number not in self.last_rungs and self.has(left):
                self.put_back(left.number, {})

    def drop_lost(self) -> list[int]:
        """Forget the trials that other workers have taken over; return their numbers."""
        kept = {trial.number for trial in self._running() if self.has(trial)}
        lost = [number for number in self.last_rungs if number not in kept]
        for number in lost:
            del self.last_rungs[number]
        return lost

    def beat(self) -> None:
        """Record the heartbeat of every held trial."""
        self.table.beat(self.last_rungs)

    def has(self, trial: FrozenTrial) -> bool:
        """Whether the record says that the trial is this worker's."""
        return is_held_by(trial, self.worker)

    def _running(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def was_changed(before: str, now: str) -> bool:
    """Return whether the settings of a trial differ from those it began with. Keys that an older version did
    not have are ignored."""
    try:
        old = json.loads(before or "{}")
    except ValueError:
        return True
    return not isinstance(old, dict) or any(old.get(k, v) != v for k, v in json.loads(now).items())
