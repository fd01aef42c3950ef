"""Trials that were stopped and may be resumed, within a budget of disk space for their checkpoints.

Optuna never changes a finished trial. A paused trial therefore stays RUNNING with a mark, counts as PRUNED
everywhere, and becomes PRUNED once it can no longer resume. It needs no worker, so it survives any kill.
"""

import shutil
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from lora_search.database.trial_table import TrialTable
from lora_search.database.write_once import read_latest, write_latest
from lora_search.search.pruning import Standings
from lora_search.search.thawing import WORTH, Memory, Params, Thaw
from lora_search.search.trials import FINISHED, PAUSED, UNSIGNED, best_until, is_held_by
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.settings.space import Space
from lora_search.study.ledger import Ledger

KEPT_GIB, THAWED_GIB = 1.0, 20.0  # where study.keep_gib is null: freeze_thaw pauses most of its trials
FITTED = "lora_search:freeze_thaw"  # system attribute of the study: what the rule has fitted
MOST_PAUSED = 100  # the best of them are compared, so that a decision costs the same at any size


class Pauses:
    """The paused trials of a study. ``thaw``, with pruner=freeze_thaw, decides about them and new ones."""

    def __init__(
        self, config: StudyConfig, table: TrialTable, ledger: Ledger, trials_folder: Path, thaw: Thaw | None
    ) -> None:
        self.config, self.table, self.ledger, self.trials_folder = config, table, ledger, trials_folder
        self.thaw = thaw
        default = KEPT_GIB if thaw is None else THAWED_GIB
        self._kept_bytes = 2**30 * (default if config.keep_gib is None else config.keep_gib)
        self._planned: tuple[int, Params] = (-1, {})  # a new trial's number and settings

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
        kept = self._ranked()
        sizes = {t.number: checkpoint_bytes(self.trials_folder, t.number) for t in kept}
        while kept and sum(sizes[t.number] for t in kept) > self._kept_bytes:
            self._settle(kept.pop())

    def promote(self, free_slots: int) -> bool:
        """Enqueue a paused trial that goes on and whose checkpoint is on this disk, if there is one; return
        whether there may be a trial to draw."""
        if self.thaw is not None:
            return self._thaw_one(self.thaw, free_slots)
        taken = self.ledger.count(*FINISHED, TrialState.RUNNING)
        if taken <= self.config.most_trials:
            for trial in self._standings.promotable(self._resumable())[:1]:
                self._resume(trial.number)
        return True

    def _thaw_one(self, thaw: Thaw, free_slots: int) -> bool:
        """Enqueue the paused trial that trains next, or plan the new one."""
        if self.ledger.count(TrialState.WAITING):
            return True
        paused = [t.number for t in self._resumable()]
        chosen = self._choose(thaw, paused, max(1, free_slots), self.ledger.num_trials)
        if not chosen:
            return not self._paused()
        if isinstance(chosen[0], int):
            self._resume(chosen[0])
        else:
            self._planned = self.ledger.num_trials, chosen[0]
        return True

    def losers(self, at_rung: Sequence[FrozenTrial], free_slots: int) -> dict[int, str]:
        """Return number -> reason for the trials at a rung that make room for others."""
        if self.thaw is None or not at_rung:
            return {}
        waiting = [t.number for t in self.ledger.open if t.state == TrialState.WAITING]
        mine = {t.number: f"rung {t.last_step}" for t in at_rung}
        able = [*mine, *waiting, *(t.number for t in self._resumable())]
        chosen = self._choose(self.thaw, able, len(mine) + free_slots, self.ledger.num_trials)
        numbers = [one for one in chosen if isinstance(one, int)]
        names = [_name(number, waiting) for number in numbers if number not in mine]
        names += ["new settings"] * (len(numbers) < len(chosen))
        better = " and ".join(dict.fromkeys(names))
        why = f"paused in favour of {better}" if names else f"not expected to lower the best by {WORTH:.1%}"
        return {number: f"{rung}: {why}" for number, rung in mine.items() if number not in numbers}

    def new_point(self, number: int) -> Params:
        """Return the settings of a new trial, {} if all have been tried."""
        if self._planned[0] == number or self.thaw is None:
            return self._planned[1]
        chosen = self._choose(self.thaw, [], 1, number)
        return chosen[0] if chosen and not isinstance(chosen[0], int) else {}

    def _choose(self, thaw: Thaw, able: Sequence[int], slots: int, number: int) -> list[int | Params]:
        taken = self.ledger.count(*FINISHED, TrialState.RUNNING, TrialState.WAITING)
        room = self.config.most_trials - taken
        return thaw.choose(self.ledger.open, able, slots, room, number)

    def end(self) -> None:
        """End all paused trials, unless one still runs or waits: its end may promote another."""
        if self.ledger.count(TrialState.RUNNING, TrialState.WAITING):
            return
        for place, trial in enumerate(self._ranked()):
            self._settle(trial, may_be_best=place == 0 and self.thaw is not None)

    @property
    def _standings(self) -> Standings:
        assert self.ledger.standings is not None, "only the rung rule resumes trials"
        return self.ledger.standings

    def _paused(self) -> list[FrozenTrial]:
        return [t for t in self.ledger.open if t.state == TrialState.PRUNED]

    def _ranked(self) -> list[FrozenTrial]:
        """Return the paused trials, the best first: those that came farthest, with freeze_thaw by value."""
        paused = self._paused()
        if self.thaw is None:
            return self._standings.ranked(paused)
        return sorted(paused, key=lambda t: (best_until(t, t.last_step or 0), t.number))

    def _resumable(self) -> list[FrozenTrial]:
        """Return the paused trials whose checkpoint is on this disk, the best first, no more than freeze_thaw
        compares."""
        here = (t for t in self._ranked() if checkpoint_bytes(self.trials_folder, t.number))
        return list(islice(here, None if self.thaw is None else MOST_PAUSED))

    def _resume(self, number: int) -> None:
        self._move(number, TrialState.WAITING, {PAUSED: False, **UNSIGNED})

    def _settle(self, trial: FrozenTrial, *, may_be_best: bool = False) -> None:
        """End a paused trial as PRUNED; or as COMPLETE if it is better than all that are."""
        value = best_until(trial, trial.last_step or 0)
        is_best = may_be_best and value < self.ledger.best_perplexity
        state = TrialState.COMPLETE if is_best else TrialState.PRUNED
        if self._move(trial.number, state, {}, value if is_best else None):
            drop_checkpoint(self.trials_folder, trial.number)

    def _move(
        self, number: int, state: TrialState, attributes: Mapping[str, object], value: float | None = None
    ) -> bool:
        """Change the state of a paused trial; return False if another worker has promoted or ended it."""
        with self.table.locked(number) as trial:
            is_paused = trial.seen.state == TrialState.RUNNING and bool(trial.seen.user_attrs.get(PAUSED))
            if is_paused:
                trial.write(attributes, state, value)
        return is_paused


def _name(number: int, waiting: Collection[int]) -> str:
    return "settings that wait" if number in waiting else f"trial {number}"


def make_pauses(
    config: SweepConfig, space: Space, table: TrialTable, ledger: Ledger, folder: Path, width: float | None
) -> Pauses | None:
    """Return what a sweep pauses its trials with, if it does. ``width``: of the base model."""
    thaw = None
    if config.pruner.chooses:
        place = table.storage, table.study_id, FITTED
        thaw = Thaw(config, space, width, Memory(partial(read_latest, *place), partial(write_latest, *place)))
        ledger.followers.append(thaw.add)
    elif not config.pruner.resume_paused:
        return None
    return Pauses(config.study, table, ledger, folder, thaw)


def checkpoint_bytes(trials_folder: Path, number: int) -> int:
    """Return the size of the trial's checkpoint on this disk, 0 if there is none."""
    files = (trials_folder / str(number) / "checkpoint").rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def drop_checkpoint(trials_folder: Path, number: int) -> None:
    """Delete the checkpoint of a finished trial; its adapter stays."""
    shutil.rmtree(trials_folder / str(number) / "checkpoint", ignore_errors=True)
