"""Trials that were stopped and may be resumed, within a budget of disk space for their checkpoints.

Optuna never changes a finished trial. A paused trial therefore stays RUNNING with a mark, counts as PRUNED
everywhere, and becomes PRUNED once it can no longer resume. It needs no worker, so it survives any kill.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from lora_search.database.trial_table import TrialTable
from lora_search.search.pruning import Standings
from lora_search.search.trials import PAUSED, UNSIGNED, is_held_by
from lora_search.settings.schema import StudyConfig
from lora_search.study.ledger import Ledger


class Pauses:
    """The paused trials of a study."""

    def __init__(self, config: StudyConfig, table: TrialTable, ledger: Ledger, trials_folder: Path) -> None:
        self.config, self.table, self.ledger, self.trials_folder = config, table, ledger, trials_folder

    def pause(self, number: int, worker: str, reason: str) -> bool:
        """Pause the worker's trial; return whether it was the worker's. If the disk budget is exceeded, the
        worst paused trials are pruned for good."""
        with self.table.locked(number) as trial:
            if not is_held_by(trial.seen, worker):
                return False
            trial.write({"reason": reason, PAUSED: True})
        self._keep_within_budget()
        return True

    def _keep_within_budget(self) -> None:
        self.ledger.read()
        kept = self._standings.ranked(self._paused())
        sizes = {t.number: checkpoint_bytes(self.trials_folder, t.number) for t in kept}
        while kept and sum(sizes[t.number] for t in kept) > self.config.keep_gib * 2**30:
            self._settle(kept.pop())

    def promote(self) -> None:
        """Enqueue the best paused trial that now ranks among the top of its rung, if the total leaves room
        and its checkpoint is on this disk."""
        taken = self.ledger.count(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        if taken > self.config.most_trials:
            return
        paused = [t for t in self._paused() if checkpoint_bytes(self.trials_folder, t.number)]
        for trial in self._standings.promotable(paused)[:1]:
            self._move(trial.number, TrialState.WAITING, {PAUSED: False, **UNSIGNED})

    def end(self) -> None:
        """Prune all paused trials, unless one still runs or waits: its end may promote another."""
        is_over = not self.ledger.count(TrialState.RUNNING, TrialState.WAITING)
        for trial in self._paused() if is_over else ():
            self._settle(trial)

    @property
    def _standings(self) -> Standings:
        assert self.ledger.standings is not None, "only the rung rule resumes trials"
        return self.ledger.standings

    def _paused(self) -> list[FrozenTrial]:
        return [t for t in self.ledger.open if t.state == TrialState.PRUNED]

    def _settle(self, trial: FrozenTrial) -> None:
        if self._move(trial.number, TrialState.PRUNED, {}):
            drop_checkpoint(self.trials_folder, trial.number)

    def _move(self, number: int, state: TrialState, attributes: Mapping[str, object]) -> bool:
        """Change the state of a paused trial; return False if another worker has promoted or ended it."""
        with self.table.locked(number) as trial:
            is_paused = trial.seen.state == TrialState.RUNNING and bool(trial.seen.user_attrs.get(PAUSED))
            if is_paused:
                trial.write(attributes, state)
        return is_paused


def checkpoint_bytes(trials_folder: Path, number: int) -> int:
    """Return the size of the trial's checkpoint on this disk, 0 if there is none."""
    files = (trials_folder / str(number) / "checkpoint").rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def drop_checkpoint(trials_folder: Path, number: int) -> None:
    """Delete the checkpoint of a finished trial; its adapter stays."""
    shutil.rmtree(trials_folder / str(number) / "checkpoint", ignore_errors=True)
