"""The study in SQL, the only truth about what ran: claim, report, judge, finish, hand back. Knows no torch.

A trial that was interrupted stays the same trial: RUNNING goes back to WAITING, keeps number, parameters and
reports, and whoever claims it next continues from its checkpoint.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.losses import Losses
from lora_search.database.presence import GRACE_HEARTBEATS, worker_name
from lora_search.database.storage import explained_errors, open_storage, quieten_optuna
from lora_search.database.trial_table import TrialTable
from lora_search.errors import StudyError
from lora_search.search.priors import first_points
from lora_search.search.pruning import make_pruner, stopped_by_optuna
from lora_search.search.sampling import make_sampler
from lora_search.search.trials import (
    FINISHED,
    is_bare,
    settled,
    trial_rows,
)
from lora_search.settings.overlay import trial_seed
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.settings.space import Space, largest
from lora_search.study.about import attributes_of, describe
from lora_search.study.adoption import check_adoptable
from lora_search.study.budget import Account, Budget, described
from lora_search.study.claims import Draws, reclaim
from lora_search.study.fingerprint import ATTRIBUTE, check_fingerprint, space_part
from lora_search.study.held import HeldTrials
from lora_search.study.identity import Identity, give_identity, number_of
from lora_search.study.ledger import Ledger
from lora_search.study.pausing import Pauses, drop_checkpoint
from lora_search.study.view import StudyView
from lora_search.trial import Measurement, Stop, StudySummary, TrialRow, TrialRun

SUMMARY_SECONDS = 1.0
BASE_WIDTH = "base_width"  # study attribute


class SweepStudy:
    """This worker's hold on the study."""

    def __init__(
        self,
        config: SweepConfig,
        space: Space,
        storage: RDBStorage,
        study: optuna.Study,
        folder: Path,
        identity: Identity,
        *,
        began: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config, self.space, self.storage, self.study, self.folder = config, space, storage, study, folder
        self.ledger = Ledger(study)
        self.trials_folder = folder.resolve() / "trials"
        self.identity = identity
        self.changes: list[str] = []  # what may differ from when the study was made, and does
        self.table = TrialTable(storage, study.study_name)
        self.losses = Losses(self.table)
        self._last_summary: tuple[float, tuple[int, ...]] = (-math.inf, ())  # when, and what was held
        self.trials = HeldTrials(config, study, self.table, worker_name(os.getpid()))
        self.held = self.trials.last_rungs  # a trial that has measured its last rung is not judged any more
        study_id = storage.get_study_id_from_name(study.study_name)
        self.account = Account(config.study, storage, study_id, self.worker, began=began, clock=clock)
        epoch_tokens = number_of(study.user_attrs, "data.train_tokens")
        self.budget = Budget(config, self.account, self.ledger, epoch_tokens)
        self.draws = Draws(config, space, study, self.table, self.ledger)
        pauses = Pauses(config.study, self.table, self.ledger, self.trials_folder)
        self.pauses = pauses if config.pruner.resume_paused else None
        self._failures: list[str] = []  # reasons of this worker's failures since its last good trial
        self._last_heartbeat = self._last_reclaim = -math.inf
        self._last_beat = time.time()  # the wall's clock: a machine that slept was silent too

    @classmethod
    def open(
        cls,
        config: SweepConfig,
        space: Space,
        fingerprint: Mapping[str, str],
        attributes: Mapping[str, str],
        folder: Path,
        *,
        began: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> "SweepStudy":
        """Create or continue the study. Raises FingerprintError where it was made with other settings.

        The budget counts this worker's time from ``began``, in the epoch seconds of ``clock``.
        """
        sampler, pruner = check_study(config, space)
        check_adoptable(config.study)
        storage = open_storage(config.study)
        with explained_errors(config.study):
            study = optuna.create_study(
                storage=storage,
                study_name=config.study.name,
                direction="minimize",
                load_if_exists=True,
                sampler=sampler,
                pruner=pruner,
            )
            wanted = {**fingerprint, **space_part(space.distributions)}
            identity = give_identity(storage, config.study.name, wanted)
            changes = check_fingerprint(config.study.name, identity.fingerprint, wanted)
            if identity.fingerprint != wanted:
                study.set_user_attr(ATTRIBUTE, wanted)
            describe(study, attributes)
            sweep_study = cls(config, space, storage, study, folder, identity, began=began, clock=clock)
            sweep_study.changes = changes
            sweep_study.account.note()
            sweep_study.reclaim_stale()
            sweep_study._enqueue_first()
            sweep_study.ledger.read(everything=True)
        return sweep_study

    @property
    def worker(self) -> str:
        """The name of this worker in the database."""
        return self.trials.worker

    def claim(self, max_trials: int) -> list[TrialRun]:
        """Return up to so many trials to train, never beyond n_trials in all; interrupted ones come first."""
        self.losses.check_trials(len(self.ledger.trials))
        if time.monotonic() - self._last_reclaim > self.config.study.heartbeat_seconds:
            self.reclaim_stale()
        runs: list[TrialRun] = []
        while len(runs) < max_trials and (run := self._claim_one()) is not None:
            runs.append(run)
        if self.pauses is not None and not runs and not self.held and self.budget.has_room(()):
            self.pauses.end()
        return runs

    def report(self, measurements: Sequence[Measurement]) -> None:
        """Write all measurements; none is judged before all are written. A rung is written once."""
        for number in dict.fromkeys(m.trial_number for m in measurements):
            trained = self.trials.report(number, [m for m in measurements if m.trial_number == number])
            if trained is not None:
                self.budget.reach(number, trained, len(self.held))

    def judge(self) -> list[Stop]:
        """Return the held trials to stop and why: the pruner says so, or another worker took them over."""
        self.ledger.read()
        held = [self.ledger.find(number) for number in self.held]
        taken = {t.number: "taken over by another worker" for t in held if not self.trials.has(t)}
        judged = [t for t in held if t.number not in taken and (t.last_step or 0) < self.held[t.number]]
        reasons = taken | self._losers(judged)
        return [Stop(trial_number=number, reason=reasons[number]) for number in sorted(reasons)]

    def beyond_budget(self, at_rung: Sequence[int]) -> list[Stop]:
        """Return the held trials, of those that have just reached a rung, whose next one the budget does not
        reach."""
        self.ledger.read()
        numbers = [n for n in at_rung if n in self.held]
        key = ", ".join(limit.key for limit in self.budget.limits())
        why = f"{key}: what is left does not reach its next rung; its checkpoint is kept"
        return [Stop(trial_number=number, reason=why) for number in self.budget.beyond(self.held, numbers)]

    def put_back(self, stop: Stop) -> None:
        """Put a held trial back, for a later start to continue."""
        self.trials.put_back(stop.trial_number, {"reason": stop.reason})
        self.held.pop(stop.trial_number, None)

    def prune(self, stop: Stop) -> str:
        """End a held trial as PRUNED, or pause it; return its state. One that was taken over is let go."""
        self._failures.clear()
        number = stop.trial_number
        if self.pauses is None or not self.pauses.pause(number, self.worker, stop.reason):
            return self._end(number, TrialState.PRUNED, stop.reason)
        del self.held[number]
        return TrialState.PRUNED.name

    def finish(self, measurement: Measurement) -> str:
        """End a held trial and return its state: COMPLETE with its best perplexity.

        A diverged one is PRUNED: the sampler learns from it, and nothing non-finite becomes COMPLETE. It
        counts as a failure all the same, so that a sweep in which every trial diverges ends.
        """
        number = measurement.trial_number
        if measurement.ended == "diverged" or not math.isfinite(measurement.best_perplexity):
            state = self._end(number, TrialState.PRUNED, f"diverged: {measurement.detail}")
            self._failures.append(f"trial {number}: diverged: {measurement.detail}")
            return state
        self._failures.clear()
        return self._end(number, TrialState.COMPLETE, measurement.detail, measurement.best_perplexity)

    def fail(self, number: int, reason: str) -> str:
        """End a held trial as FAIL and return its state."""
        state = self._end(number, TrialState.FAIL, reason)
        self._failures.append(f"trial {number}: {reason}")
        return state

    def note_recovery(self, measurement: Measurement) -> None:
        """Store what was wrong with the checkpoint that a held trial went on from."""
        self.trials.note(measurement.trial_number, {"recovery": measurement.recovery})

    @property
    def was_silent(self) -> bool:
        """Whether this worker's heartbeat stood still for so long that others may have taken its trials."""
        silence = time.time() - self._last_beat
        return silence > GRACE_HEARTBEATS * self.config.study.heartbeat_seconds

    def let_go(self) -> list[int]:
        """Forget the held trials that other workers took over; return their numbers."""
        return self.trials.drop_lost()

    def put_back_unheld(self) -> None:
        """Put back what a claim that the database cut short left RUNNING in this worker's name."""
        self.trials.put_back_unheld()

    def hand_back(self, reason: str) -> None:
        """Put every held trial back, for the same command or another worker to continue."""
        self.trials.put_back_all(reason)
        self.account.close()

    def heartbeat(self) -> None:
        """Tell other workers that this one lives, at most once per study.heartbeat_seconds."""
        self.account.note()
        now = time.monotonic()
        self.losses.check_file()
        if now - self._last_heartbeat < self.config.study.heartbeat_seconds:
            return
        self.losses.check_trials(len(self.ledger.trials))
        self.trials.beat()
        self._last_heartbeat, self._last_beat = now, time.time()

    def reclaim_stale(self) -> int:
        """Put back the trials of dead workers; return how many. Fails those that were put back too often."""
        self._last_reclaim = time.monotonic()
        return reclaim(self.config.study, self.study, self.table, self.held)

    @property
    def is_finished(self) -> bool:
        """Whether no trial is left to claim: the total is reached, or the space is exhausted."""
        if self.exhausted:
            return True
        self.ledger.read(everything=True)
        is_full = self.ledger.count(*FINISHED) >= self.config.study.most_trials
        return is_full and not any(t.state in FINISHED for t in self.ledger.open)  # none is paused

    @property
    def exhausted(self) -> bool:
        """Whether every point of the space was tried before the total was reached."""
        return self.draws.exhausted

    @property
    def is_out_of_budget(self) -> bool:
        """Whether hours, tokens or cost are spent, as far as this worker knows."""
        return self.budget.is_over

    def check_failures(self) -> None:
        """Raise StudyError when max_failures_in_a_row trials of this worker failed, none good between."""
        limit = self.config.study.max_failures_in_a_row
        if len(self._failures) >= limit:
            raise StudyError(
                f"study.max_failures_in_a_row: {len(self._failures)} trials failed in a row, "
                f"the last one, {self._failures[-1]}. Mend the cause, then the same command goes on."
            )

    def num_running_elsewhere(self) -> int:
        """Return how many trials other workers hold or have left while the total is not reached."""
        self.ledger.read(everything=True)
        if self.ledger.count(*FINISHED) >= self.config.study.most_trials:
            return 0
        unfinished = [TrialState.RUNNING]
        if self.budget.has_room(self.held):
            unfinished.append(TrialState.WAITING)  # handed back since this worker asked for more
        return sum(t.state in unfinished and t.number not in self.held for t in self.ledger.open)

    @property
    def standing(self) -> str:
        """How far the study is, and what that means for study.n_trials, in words."""
        is_finished, n_trials = self.is_finished, self.config.study.n_trials
        finished = self.ledger.count(*FINISHED)
        text = f"{finished} of {n_trials} trials done" if n_trials else f"{finished} trials done"
        text = "; ".join([text, *(f"{limit.key} {limit} spent" for limit in self.budget.limits())])
        if finished > self.config.study.most_trials:
            return f"{text}: study.n_trials is lower than what has finished; all stay, none is added"
        if (limit := self.budget.reached) is not None and not is_finished:
            return f"{text}; a higher {limit.key} goes on"
        return f"{text}; a higher study.n_trials goes on" if is_finished else text

    def summary(self) -> StudySummary:
        """Return where the study stands. What other workers did may be missing for SUMMARY_SECONDS, so that
        asking at every pass costs nothing."""
        seconds, held = time.monotonic() - self._last_summary[0], tuple(self.held)
        if seconds > SUMMARY_SECONDS or held != self._last_summary[1]:
            self.ledger.read()
            self._last_summary = (time.monotonic(), held)
        return self.ledger.summary(self.config.study.n_trials, self.budget.limits())

    def rows(self) -> list[TrialRow]:
        """Return every trial that began or will begin, by number."""
        self.losses.check_trials(len(self.ledger.trials))
        return trial_rows([settled(t) for t in self.study.get_trials(deepcopy=False)])

    def attributes(self) -> dict[str, str]:
        """Return what the study knows about itself."""
        spent = self.account.spent(self.ledger.tokens)
        return attributes_of(self.study) | described(self.config.study, spent)

    def remember(self, key: str, measure: Callable[[], str]) -> float:
        """Return a number that the study keeps, measured now if it is not there yet or cannot be read."""
        if (known := number_of(self.study.user_attrs, key)) is not None:
            return known
        self.study.set_user_attr(key, measure())
        return float(self.study.user_attrs[key])

    @staticmethod
    def read(config: StudyConfig) -> tuple[list[TrialRow], dict[str, str]]:
        """Return trials and attributes of a study without changing it."""
        view = StudyView(config)
        return view.rows(), view.attributes()

    def _claim_one(self) -> TrialRun | None:
        if not self.budget.has_room(self.held):
            return None
        if self.pauses is not None:
            self.ledger.read(everything=True)
            self.pauses.promote()
        while (number := self.draws.draw(self.worker)) is not None:
            if (run := self._take(number)) is not None:
                return run
        return None

    def _take(self, number: int) -> TrialRun | None:
        """Begin a trial that was drawn; None where that cannot be."""
        if (begun := self.trials.begin(number)) is None:
            return None
        settings, record = begun
        self.budget.begin(number)
        return TrialRun(
            number=number,
            seed=trial_seed(self.config, record.params, number),
            settings=settings,
            folder=str(self.trials_folder / str(number)),
            study_id=self.identity.id or "",
            perplexities=dict(record.intermediate_values),
        )

    def _losers(self, judged: Sequence[FrozenTrial]) -> dict[int, str]:
        if self.ledger.standings is not None:
            return self.ledger.standings.losers(self.ledger.open, judged)
        trained = [trial for trial in judged if not is_bare(trial)]
        stopped = stopped_by_optuna(self.study, trained, self.config.seed)
        return {t.number: f"rung {t.last_step}: {self.config.pruner.name} rule" for t in stopped}

    def _enqueue_first(self) -> None:
        width = number_of(self.study.user_attrs, BASE_WIDTH)
        self.table.enqueue_first(first_points(self.config, self.space, width))

    def _end(self, number: int, state: TrialState, reason: str, value: float | None = None) -> str:
        """End the trial unless another worker took it over; return the name of its state."""
        ended = self.trials.end(number, state, reason, value)
        if ended in FINISHED:
            drop_checkpoint(self.trials_folder, number)
        return ended.name


def check_study(
    config: SweepConfig, space: Space
) -> tuple[optuna.samplers.BaseSampler, optuna.pruners.BasePruner]:
    """Return sampler and pruner. Raises ConfigError where they cannot work on this space or these rungs."""
    quieten_optuna()
    num_rungs = largest(config, space, "train.epochs") * config.train.evals_per_epoch
    sampler = make_sampler(config.sampler, space.distributions, config.seed)
    return sampler, make_pruner(config.pruner, num_rungs)
