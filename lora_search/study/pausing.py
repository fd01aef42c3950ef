"""Trials that were stopped and may be taken up again, within a budget of disk space for their checkpoints.

Optuna never changes a finished trial. A paused one therefore stays RUNNING, marked as paused, counts as
PRUNED everywhere, and is told PRUNED when it can no longer come back. It needs no worker, so it survives any
kill.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lora_search.search.pruning import Standings
from lora_search.search.trials import PAUSED
from lora_search.settings.schema import StudyConfig
from lora_search.study.ledger import Ledger


class Pauses:
    """The paused trials of a study; ``id_of`` maps a trial's number to its id in the database."""

    def __init__(
        self,
        config: StudyConfig,
        study: optuna.Study,
        storage: RDBStorage,
        ledger: Ledger,
        trials_folder: Path,
        id_of: Callable[[int], int],
    ) -> None:
        self.config, self.study, self.storage, self.ledger = config, study, storage, ledger
        self.trials_folder, self.id_of = trials_folder, id_of

    def pause(self, trial: optuna.Trial, reason: str) -> None:
        """Stop the trial for now; where the budget is spent, the worst of all paused ones is out for good."""
        trial.set_user_attr("reason", reason)
        trial.set_user_attr(PAUSED, True)  # last: until then it is an ordinary running trial
        self.ledger.read()
        kept = self._standings.ranked(self._paused())
        sizes = {t.number: checkpoint_bytes(self.trials_folder, t.number) for t in kept}
        while kept and sum(sizes[t.number] for t in kept) > self.config.keep_gib * 2**30:
            self._settle(kept.pop())

    def promote(self) -> None:
        """Put the best paused trial in line that belongs to the top of its rung today, if there is one, the
        total leaves it room, and its checkpoint lies at hand."""
        taken = self.ledger.count(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        if taken > self.config.n_trials:
            return
        paused = [t for t in self._paused() if checkpoint_bytes(self.trials_folder, t.number)]
        for trial in self._standings.promotable(self.ledger.open, paused)[:1]:
            trial_id = self.id_of(trial.number)
            if self.storage.get_trial(trial_id).state == TrialState.RUNNING:
                self.storage.set_trial_state_values(trial_id, TrialState.WAITING)
                self.storage.set_trial_user_attr(trial_id, PAUSED, False)

    def end(self) -> None:
        """Tell all paused trials PRUNED, unless one still runs or waits: its end may lift another."""
        is_over = not self.ledger.count(TrialState.RUNNING, TrialState.WAITING)
        for trial in self._paused() if is_over else ():
            self._settle(trial)

    @property
    def _standings(self) -> Standings:
        assert self.ledger.standings is not None, "only the rung rule resumes"
        return self.ledger.standings

    def _paused(self) -> list[FrozenTrial]:
        return [t for t in self.ledger.open if t.state == TrialState.PRUNED]

    def _settle(self, trial: FrozenTrial) -> None:
        if self.storage.get_trial(self.id_of(trial.number)).state == TrialState.RUNNING:
            self.study.tell(trial.number, state=TrialState.PRUNED)
        drop_checkpoint(self.trials_folder, trial.number)


def checkpoint_bytes(trials_folder: Path, number: int) -> int:
    """Return what the trial's checkpoint takes on this disk, 0 where there is none."""
    files = (trials_folder / str(number) / "checkpoint").rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def drop_checkpoint(trials_folder: Path, number: int) -> None:
    """Delete the checkpoint of a trial that is through; its adapter stays."""
    shutil.rmtree(trials_folder / str(number) / "checkpoint", ignore_errors=True)
