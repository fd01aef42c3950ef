"""The study in SQL, the only record of what ran: claim, report, judge, finish, hand back. Imports no torch.

An interrupted trial stays the same trial: it returns from RUNNING to WAITING with its number, parameters and
reports, and the worker that claims it next resumes from its checkpoint.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.changes import Changes
from lora_search.database.deletions import Losses
from lora_search.database.drivers import SQLITE_SECONDS
from lora_search.database.presence import GRACE_HEARTBEATS, worker_name
from lora_search.database.storage import explained_errors, locked_from_the_start, open_storage
from lora_search.database.trial_storage import DrawingStorage
from lora_search.database.trial_table import TrialTable
from lora_search.errors import StudyError
from lora_search.search.priors import first_points
from lora_search.search.pruning import stopped_by_optuna
from lora_search.search.sampling import Chosen, Outlook
from lora_search.search.trials import FINISHED, is_bare, settled, trial_rows
from lora_search.settings.overlay import trial_seed
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.settings.space import Space
from lora_search.study.answer_metric import with_metric
from lora_search.study.budget import Account, Budget, described
from lora_search.study.claims import Draws, reclaim
from lora_search.study.fingerprint import check_fingerprint, space_part
from lora_search.study.held_trials import HeldTrials
from lora_search.study.identity import Identity, give_identity, number_of
from lora_search.study.ledger import Ledger
from lora_search.study.opening_checks import check_adoptable, check_study
from lora_search.study.pausing import drop_checkpoint, make_pauses
from lora_search.study.provenance import PEAK, attributes_of, describe, standing
from lora_search.study.view import StudyView
from lora_search.study.widening import take_changes
from lora_search.trial import Measurement, Stop, StudySummary, TrialRow, TrialRun

SUMMARY_SECONDS, SUMMARY_PER_TRIAL = 1.0, 0.0025  # more for each unfinished trial: at 4,000 every 11 s
BASE_WIDTH = "base_width"  # study attribute


class SweepStudy:
    """The study as one worker uses it."""

    def __init__(
        self, config: SweepConfig, space: Space, storage: RDBStorage, study: optuna.Study, folder: Path,
        identity: Identity, *, began: float | None = None, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.config, self.space, self.storage, self.study, self.folder = config, space, storage, study, folder
        self.table = TrialTable(storage, study.study_name)
        self.ledger = Ledger(Changes(storage, self.table.study_id).read, study.pruner)
        if isinstance(study.sampler, Outlook):
            self.ledger.followers.append(study.sampler.follow(lambda: self.ledger.open))
        self.trials_folder = folder.resolve() / "trials"
        self.identity = identity
        self.changes: list[str] = []  # permitted changes since the first start, in words
        self.losses = Losses(self.table)
        self._last_look: tuple[float, tuple[int, ...]] = (-math.inf, ())  # when, and what was held
        self.trials = HeldTrials(config, study, self.table, worker_name(os.getpid()))
        self.held = self.trials.last_rungs  # a trial at its last rung is no longer judged
        study_id = self.table.study_id
        self.account = Account(config.study, storage, study_id, self.worker, began=began, clock=clock)
        epoch_tokens = number_of(attributes_of(study), "data.train_tokens")
        self.budget = Budget(config, self.account, self.ledger, epoch_tokens)
        self.draws = Draws(config, space, study, self.table, self.ledger)
        self.num_slots = 1  # of this worker
        self._at_rung: set[int] = set()  # held trials that have reached a rung since the last judgement
        width = number_of(attributes_of(study), BASE_WIDTH)
        self.pauses = make_pauses(config, space, self.table, self.ledger, self.trials_folder, width)
        if isinstance(study.sampler, Chosen) and self.pauses is not None:
            study.sampler.choose = self.pauses.new_point
        self._failures: list[str] = []  # reasons of this worker's failures since its last good trial
        self._last_heartbeat = self._last_reclaim = -math.inf
        self._last_beat = time.time()  # wall-clock time, which also counts while the machine sleeps

    @classmethod
    def open(
        cls, config: SweepConfig, space: Space, fingerprint: Mapping[str, str],
        attributes: Mapping[str, str], folder: Path, *,
        began: float | None = None, clock: Callable[[], float] = time.time,
    ) -> "SweepStudy":  # fmt: skip
        """Create or continue the study. Raises FingerprintError if it was made with other settings.

        The budget counts this worker's time from ``began``, in epoch seconds of ``clock``.
        """
        sampler, pruner = check_study(config, space)
        check_adoptable(config.study)
        storage = open_storage(config.study)
        with explained_errors(config.study), locked_from_the_start(SQLITE_SECONDS):
            study = optuna.create_study(
                storage=DrawingStorage(storage),
                study_name=config.study.name,
                direction="minimize",
                load_if_exists=True,
                sampler=sampler,
                pruner=pruner,
            )
            wanted = {**fingerprint, **space_part(space)}
            identity = give_identity(storage, config.study.name, wanted)
            changes = check_fingerprint(config.study.name, identity.fingerprint, wanted)
            take_changes(config.study, study, TrialTable(storage, config.study.name), identity, wanted)
            describe(study, attributes)
            sweep_study = cls(config, space, storage, study, folder, identity, began=began, clock=clock)
            sweep_study.changes = changes
            sweep_study.account.note()
            sweep_study.reclaim_stale()
            sweep_study._enqueue_first()
            sweep_study.ledger.read()
        return sweep_study

    @property
    def worker(self) -> str:
        """The name of this worker in the database."""
        return self.trials.worker

    def claim(self, max_trials: int) -> list[TrialRun]:
        """Return up to ``max_trials`` trials to train, interrupted ones first, never more than n_trials in
        all."""
        self.losses.check_trials(self.ledger.num_trials)
        if time.monotonic() - self._last_reclaim > self.config.study.heartbeat_seconds:
            self.reclaim_stale()
        runs: list[TrialRun] = []
        while len(runs) < max_trials and (run := self._claim_one()) is not None:
            runs.append(run)
        is_idle = not runs and not self.held and not self.draws.outdated
        if self.pauses is not None and is_idle and self.budget.has_room(()):
            self.pauses.end()
            self.draws.has_room()  # notes it where the space is exhausted
        return runs

    def report(self, measurements: Sequence[Measurement]) -> None:
        """Write all measurements, each rung once. Trials are judged only after all are written."""
        numbers = dict.fromkeys(m.trial_number for m in measurements)
        news = {number: [m for m in measurements if m.trial_number == number] for number in numbers}
        for number, trained in self.trials.report(news).items():
            self._at_rung.add(number)
            self.budget.reach(number, trained, len(self.held))

    def judge(self) -> list[Stop]:
        """Return the held trials to stop, with reasons: the pruner stops them, or another worker has taken
        them over."""
        self.ledger.read(self.table.id_of(number) for number in self.held)
        self._last_look = time.monotonic(), tuple(self.held)
        held = {number: self.ledger.find(number) for number in self.held}
        mine = [trial for trial in held.values() if trial is not None and self.trials.has(trial)]
        taken = dict.fromkeys(held.keys() - {t.number for t in mine}, "taken over by another worker")
        judged = [t for t in mine if (t.last_step or 0) < self.held[t.number]]
        reasons = taken | self._losers(judged)
        self._at_rung.clear()
        return [Stop(trial_number=number, reason=reasons[number]) for number in sorted(reasons)]

    def beyond_budget(self, at_rung: Sequence[int]) -> list[Stop]:
        """Return which of the held trials that have just reached a rung cannot reach the next one within the
        budget."""
        self.ledger.read()
        numbers = [n for n in at_rung if n in self.held]
        key = ", ".join(limit.key for limit in self.budget.limits())
        why = f"{key}: the rest is not enough for its next rung; its checkpoint is kept"
        return [Stop(trial_number=number, reason=why) for number in self.budget.beyond(self.held, numbers)]

    def put_back(self, stop: Stop) -> None:
        """Return a held trial to the queue, for a later start to continue."""
        self.trials.put_back(stop.trial_number, {"reason": stop.reason})
        self.held.pop(stop.trial_number, None)

    def prune(self, stop: Stop) -> str:
        """End a held trial as PRUNED, or pause it; return its state. A trial taken over is only dropped."""
        self._failures.clear()
        number = stop.trial_number
        if self.pauses is None or not self.pauses.pause(number, self.worker, stop.reason):
            return self._end(number, TrialState.PRUNED, stop.reason)
        del self.held[number]
        return TrialState.PRUNED.name

    def finish(self, measurement: Measurement) -> str:
        """End a held trial and return its state: COMPLETE with its best perplexity.

        A diverged trial is PRUNED: the sampler learns from it, and no non-finite value becomes COMPLETE. It
        also counts as a failure, so that a sweep in which every trial diverges ends.
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

    @property
    def was_silent(self) -> bool:
        """Whether this worker sent no heartbeat for so long that others may have taken its trials."""
        silence = time.time() - self._last_beat
        return silence > GRACE_HEARTBEATS * self.config.study.heartbeat_seconds

    def hand_back(self, reason: str) -> None:
        """Return every held trial to the queue, for the same command or another worker to continue."""
        self.trials.put_back_all(reason)
        self.account.close()

    def heartbeat(self) -> None:
        """Send a heartbeat to other workers, at most once per study.heartbeat_seconds."""
        self.account.note()
        now = time.monotonic()
        self.losses.check_file()
        if now - self._last_heartbeat < self.config.study.heartbeat_seconds:
            return
        self.losses.check_trials(self.ledger.num_trials)
        self.trials.beat()
        self._last_heartbeat, self._last_beat = now, time.time()

    def reclaim_stale(self) -> int:
        """Put the trials of dead workers back; return how many. Fails those that were put back too often."""
        self._last_reclaim = time.monotonic()
        self.ledger.read()
        return reclaim(self.config.study, self.ledger.open, self.table, self.held)

    @property
    def is_finished(self) -> bool:
        """Whether no trial is left to claim: the total is reached, or the space is exhausted."""
        self.ledger.read()
        is_full = self.draws.exhausted or self.ledger.count(*FINISHED) >= self.config.study.most_trials
        return is_full and not any(t.state in FINISHED for t in self.ledger.open)  # none is paused

    def check_failures(self) -> None:
        """Raise StudyError when max_failures_in_a_row trials of this worker failed, none good between."""
        limit = self.config.study.max_failures_in_a_row
        if len(self._failures) >= limit:
            raise StudyError(
                f"study.max_failures_in_a_row: {len(self._failures)} trials failed in a row, "
                f"the last one, {self._failures[-1]}. Fix the cause, then run the same command again."
            )

    def num_running_elsewhere(self) -> int:
        """Return how many trials of others this worker may have to take; 0 once the total is reached."""
        self.ledger.read()
        if self.draws.outdated or self.ledger.count(*FINISHED) >= self.config.study.most_trials:
            return 0
        unfinished = [TrialState.RUNNING]
        if self.budget.has_room(self.held):
            unfinished.append(TrialState.WAITING)  # handed back since this worker asked for more
        return sum(t.state in unfinished and t.number not in self.held for t in self.ledger.open)

    @property
    def standing(self) -> str:
        """The progress of the study in words, with the setting to raise for more."""
        is_finished = self.is_finished
        return standing(self.ledger.summary(self.config.study.n_trials, self.budget.limits()), is_finished)

    def summary(self) -> StudySummary:
        """Return the progress of the study, some seconds old for other workers' trials, so that a call at
        every pass costs nothing."""
        pause = SUMMARY_SECONDS + SUMMARY_PER_TRIAL * self.ledger.num_open
        if time.monotonic() - self._last_look[0] > pause or tuple(self.held) != self._last_look[1]:
            self.ledger.read()
            self._last_look = time.monotonic(), tuple(self.held)
        return self.ledger.summary(self.config.study.n_trials, self.budget.limits())

    def rows(self) -> list[TrialRow]:
        """Return every trial that began or will begin, by number."""
        self.losses.check_trials(self.ledger.num_trials)
        trials = [settled(t) for t in self.study.get_trials(deepcopy=False)]
        return with_metric(trial_rows(trials), trials, self.study)

    def attributes(self) -> dict[str, str]:
        """Return the study's attributes and what it has spent."""
        spent = self.account.read().spent(self.ledger.tokens)
        return attributes_of(self.study) | described(self.config.study, spent)

    def remember(self, key: str, measure: Callable[[], str]) -> float:
        """Return a number stored in the study; measure and store it if it is missing or unreadable."""
        if (known := number_of(self.study.user_attrs, key)) is not None:
            return known
        self.study.set_user_attr(key, measure())
        return float(self.study.user_attrs[key])

    def note_peak(self, peak_bytes: int) -> None:  # the most that any worker took
        if peak_bytes > (number_of(self.study.user_attrs, PEAK) or 0):
            self.study.set_user_attr(PEAK, str(peak_bytes))

    @staticmethod
    def read(config: StudyConfig) -> tuple[list[TrialRow], dict[str, str]]:
        """Return trials and attributes of a study without changing it."""
        view = StudyView(config)
        return view.rows(), view.attributes()

    def _claim_one(self) -> TrialRun | None:
        if not self.budget.has_room(self.held):
            return None
        if self.pauses is not None:
            self.ledger.read()
            if not self.pauses.promote(self.num_slots - len(self.held)):
                return None
        while (number := self.draws.draw(self.worker)) is not None:
            if (run := self._take(number)) is not None:
                return run
        return None

    def _take(self, number: int) -> TrialRun | None:
        """Begin a trial that was drawn; None if that is not possible."""
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
        if self.pauses is not None and self.config.pruner.chooses:
            first = self.config.pruner.first_rung
            at_rung = [t for t in judged if t.number in self._at_rung and (t.last_step or 0) >= first]
            return self.pauses.losers(at_rung, self.num_slots - len(self.held))
        if self.ledger.standings is not None:
            return self.ledger.standings.losers(judged)
        trained = [trial for trial in judged if not is_bare(trial)]
        stopped = stopped_by_optuna(self.study, trained, self.config.seed)
        return {t.number: f"rung {t.last_step}: {self.config.pruner.name} rule" for t in stopped}

    def _enqueue_first(self) -> None:
        width = number_of(attributes_of(self.study), BASE_WIDTH)
        self.table.enqueue_first(first_points(self.config, self.space, width))

    def _end(self, number: int, state: TrialState, reason: str, value: float | None = None) -> str:
        """End the trial unless another worker took it over; return the name of its state."""
        ended = self.trials.end(number, state, reason, value)
        if ended in FINISHED:
            drop_checkpoint(self.trials_folder, number)
        return ended.name
