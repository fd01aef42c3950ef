"""The study in SQL, the only truth about what ran: claim, report, judge, finish, hand back. Knows no torch.

A trial that was interrupted stays the same trial: RUNNING goes back to WAITING, keeps number, parameters and
reports, and whoever claims it next continues from its checkpoint.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.presence import GRACE_HEARTBEATS, worker_name
from lora_search.database.storage import explained_errors, open_storage, quieten_optuna
from lora_search.errors import StudyError
from lora_search.search.pruning import make_pruner, stopped_by_optuna
from lora_search.search.sampling import make_sampler
from lora_search.search.trials import FINISHED, PROGRESS, progress_after, settled, trial_rows
from lora_search.settings.overlay import trial_settings
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.settings.space import Space, largest
from lora_search.study.about import attributes_of, describe
from lora_search.study.claims import Draws, reclaim
from lora_search.study.fingerprint import check_fingerprint
from lora_search.study.ledger import Ledger
from lora_search.study.pausing import Pauses, drop_checkpoint
from lora_search.study.view import StudyView
from lora_search.trial import Measurement, Stop, StudySummary, TrialRow, TrialRun, draw_seed

SUMMARY_SECONDS = 1.0


class SweepStudy:
    """This worker's hold on the study."""

    def __init__(
        self, config: SweepConfig, space: Space, storage: RDBStorage, study: optuna.Study, folder: Path
    ) -> None:
        self.config, self.space, self.storage, self.study, self.folder = config, space, storage, study, folder
        self.ledger = Ledger(study)
        self.trials_folder = folder.resolve() / "trials"
        self.widened: list[str] = []  # ranges of the space that are wider than when the study was made
        self.draws = Draws(config, space, study, self.ledger)
        self.held: dict[int, optuna.Trial] = {}
        self._last_summary: tuple[float, tuple[int, ...]] = (-math.inf, ())  # when, and what was held
        self._last_rung: dict[int, int] = {}  # of each held trial; who has measured it is not judged any more
        self._ids: dict[int, int] = {}  # trial number -> its id in the database
        self.worker = worker_name(os.getpid())
        pauses = Pauses(config.study, study, storage, self.ledger, self.trials_folder, self._id)
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
    ) -> "SweepStudy":
        """Create or continue the study. Raises FingerprintError where it was made with other settings."""
        sampler, pruner = check_study(config, space)
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
            widened = check_fingerprint(study, fingerprint, space.distributions)
            describe(study, attributes)
            sweep_study = cls(config, space, storage, study, folder)
            sweep_study.widened = widened
            sweep_study.reclaim_stale()
            sweep_study._enqueue_default()
        return sweep_study

    def claim(self, max_trials: int) -> list[TrialRun]:
        """Return up to so many trials to train, never beyond n_trials in all; interrupted ones come first."""
        if time.monotonic() - self._last_reclaim > self.config.study.heartbeat_seconds:
            self.reclaim_stale()
        runs: list[TrialRun] = []
        while len(runs) < max_trials and (run := self._claim_one()) is not None:
            runs.append(run)
        if self.pauses is not None and not runs and not self.held:
            self.pauses.end()
        return runs

    def report(self, measurements: Sequence[Measurement]) -> None:
        """Write all measurements; none is judged before all are written. A rung is written once."""
        self.ledger.read()
        mine = [m for m in measurements if self._is_mine(self.ledger.find(m.trial_number))]
        for m in mine:
            reported = self.ledger.find(m.trial_number).intermediate_values
            if math.isfinite(m.perplexity) and m.rung not in reported:
                self.held[m.trial_number].report(m.perplexity, m.rung)
        for number in dict.fromkeys(m.trial_number for m in mine):  # one write, however many rungs
            news = [m for m in mine if m.trial_number == number]
            progress = progress_after(self.ledger.find(number), news)
            self.held[number].set_user_attr(PROGRESS, progress)

    def judge(self) -> list[Stop]:
        """Return the held trials to stop and why: the pruner says so, or another worker took them over."""
        self.ledger.read()
        held = [self.ledger.find(number) for number in self.held]
        taken = {t.number: "taken over by another worker" for t in held if not self._is_mine(t)}
        judged = [t for t in held if t.number not in taken and (t.last_step or 0) < self._last_rung[t.number]]
        reasons = taken | self._losers(judged)
        return [Stop(trial_number=number, reason=reasons[number]) for number in sorted(reasons)]

    def prune(self, stop: Stop) -> str:
        """End a held trial as PRUNED, or pause it; return its state. One that was taken over is let go."""
        self._failures.clear()
        trial = self.held[stop.trial_number]
        if self.pauses is None or not self._is_mine(self._frozen(trial)):
            return self._end(trial, TrialState.PRUNED, stop.reason)
        self.pauses.pause(trial, stop.reason)
        del self.held[stop.trial_number]
        return TrialState.PRUNED.name

    def finish(self, measurement: Measurement) -> str:
        """End a held trial and return its state: COMPLETE with its best perplexity.

        A diverged one is PRUNED: the sampler learns from it, and nothing non-finite becomes COMPLETE. It
        counts as a failure all the same, so that a sweep in which every trial diverges ends.
        """
        trial = self.held[measurement.trial_number]
        if measurement.ended == "diverged" or not math.isfinite(measurement.best_perplexity):
            state = self._end(trial, TrialState.PRUNED, f"diverged: {measurement.detail}")
            self._failures.append(f"trial {measurement.trial_number}: diverged: {measurement.detail}")
            return state
        self._failures.clear()
        return self._end(trial, TrialState.COMPLETE, measurement.detail, measurement.best_perplexity)

    def fail(self, number: int, reason: str) -> str:
        """End a held trial as FAIL and return its state."""
        state = self._end(self.held[number], TrialState.FAIL, reason)
        self._failures.append(f"trial {number}: {reason}")
        return state

    def note_recovery(self, measurement: Measurement) -> None:
        """Store what was wrong with the checkpoint that a held trial went on from."""
        self.held[measurement.trial_number].set_user_attr("recovery", measurement.recovery)

    @property
    def was_silent(self) -> bool:
        """Whether this worker's heartbeat stood still for so long that others may have taken its trials."""
        silence = time.time() - self._last_beat
        return silence > GRACE_HEARTBEATS * self.config.study.heartbeat_seconds

    def let_go(self) -> list[int]:
        """Forget the held trials that other workers took over; return their numbers."""
        lost = [n for n, trial in self.held.items() if not self._is_mine(self._frozen(trial))]
        for number in lost:
            del self.held[number]
        return lost

    def put_back_unheld(self) -> None:
        """Put back what a claim that the database cut short left RUNNING in this worker's name."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number not in self.held and self._is_mine(trial):
                self.storage.set_trial_state_values(self._id(trial.number), TrialState.WAITING)

    def hand_back(self, reason: str) -> None:
        """Put every held trial back, for the same command or another worker to continue."""
        for trial in self.held.values():
            if self._is_mine(self._frozen(trial)):
                trial.set_user_attr("reason", reason)
                trial.set_user_attr("worker", "")
                self.storage.set_trial_state_values(self._id(trial.number), TrialState.WAITING)
        self.held.clear()

    def heartbeat(self) -> None:
        """Tell other workers that this one lives, at most once per study.heartbeat_seconds."""
        now = time.monotonic()
        if now - self._last_heartbeat < self.config.study.heartbeat_seconds:
            return
        for number in self.held:
            self.storage.record_heartbeat(self._id(number))
        self._last_heartbeat, self._last_beat = now, time.time()

    def reclaim_stale(self) -> int:
        """Put back the trials of dead workers; return how many. Fails those that were put back too often."""
        self._last_reclaim = time.monotonic()
        return reclaim(self.config.study, self.study, self.storage, self.held, self._id)

    @property
    def is_finished(self) -> bool:
        """Whether no trial is left to claim: the total is reached, or the space is exhausted."""
        if self.exhausted:
            return True
        self.ledger.read(everything=True)
        is_full = self.ledger.count(*FINISHED) >= self.config.study.n_trials
        return is_full and not any(t.state in FINISHED for t in self.ledger.open)  # none is paused

    @property
    def exhausted(self) -> bool:
        """Whether every point of the space was tried before the total was reached."""
        return self.draws.exhausted

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
        if self.ledger.count(*FINISHED) >= self.config.study.n_trials:
            return 0
        unfinished = (TrialState.RUNNING, TrialState.WAITING)  # handed back since this worker asked for more
        return sum(t.state in unfinished and t.number not in self.held for t in self.ledger.open)

    @property
    def standing(self) -> str:
        """How far the study is, and what that means for study.n_trials, in words."""
        is_finished, n_trials = self.is_finished, self.config.study.n_trials
        finished = self.ledger.count(*FINISHED)
        text = f"{finished} of {n_trials} trials done"
        if finished > n_trials:
            return f"{text}: study.n_trials is lower than what has finished; all stay, none is added"
        return f"{text}; a higher study.n_trials goes on" if is_finished else text

    def summary(self) -> StudySummary:
        """Return where the study stands. What other workers did may be missing for SUMMARY_SECONDS, so that
        asking at every pass costs nothing."""
        seconds, held = time.monotonic() - self._last_summary[0], tuple(self.held)
        if seconds > SUMMARY_SECONDS or held != self._last_summary[1]:
            self.ledger.read()
            self._last_summary = (time.monotonic(), held)
        return self.ledger.summary(self.config.study.n_trials)

    def rows(self) -> list[TrialRow]:
        """Return every trial that began or will begin, by number."""
        return trial_rows([settled(t) for t in self.study.get_trials(deepcopy=False)])

    def attributes(self) -> dict[str, str]:
        """Return what the study knows about itself."""
        return attributes_of(self.study)

    def remember(self, key: str, measure: Callable[[], str]) -> str:
        """Return a study attribute, measured now if it is not there yet."""
        if key not in self.study.user_attrs:
            self.study.set_user_attr(key, measure())
        return str(self.study.user_attrs[key])

    @staticmethod
    def read(config: StudyConfig) -> tuple[list[TrialRow], dict[str, str]]:
        """Return trials and attributes of a study without changing it."""
        view = StudyView(config)
        return view.rows(), view.attributes()

    def _claim_one(self) -> TrialRun | None:
        if self.pauses is not None:
            self.ledger.read(everything=True)
            self.pauses.promote()
        trial = self.draws.draw(self._sign)
        return None if trial is None else self._take(trial)

    def _sign(self, trial: optuna.Trial) -> None:
        """Make the trial this worker's; first its heartbeat, so that a signature is never a silent one's."""
        self.storage.record_heartbeat(self._id(trial.number))
        trial.set_user_attr("worker", self.worker)

    def _take(self, trial: optuna.Trial) -> TrialRun:
        settings = trial_settings(self.config, trial.params)
        trial.set_user_attr("settings", json.dumps(asdict(settings)))
        trial.set_user_attr("reason", "")
        self.held[trial.number], self._last_rung[trial.number] = trial, settings.num_rungs
        folder = str(self.trials_folder / str(trial.number))
        seed = draw_seed(self.config.seed, trial.number)
        known = dict(self._frozen(trial).intermediate_values)
        return TrialRun(number=trial.number, seed=seed, settings=settings, folder=folder, perplexities=known)

    def _losers(self, judged: Sequence[FrozenTrial]) -> dict[int, str]:
        if self.ledger.standings is not None:
            return self.ledger.standings.losers(self.ledger.open, judged)
        stopped = stopped_by_optuna(self.study, judged, self.config.seed)
        return {t.number: f"rung {t.last_step}: {self.config.pruner.name} rule" for t in stopped}

    def _is_mine(self, trial: FrozenTrial) -> bool:
        return trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == self.worker

    def _enqueue_default(self) -> None:
        params = self.space.default_params(self.config)
        self.ledger.read(everything=True)
        if self.config.study.first_trial_is_default and params is not None and not self.ledger.trials:
            self.study.enqueue_trial(params)

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return self.storage.get_trial(self._id(trial.number))

    def _id(self, number: int) -> int:
        if number not in self._ids:
            study_id = self.storage.get_study_id_from_name(self.study.study_name)
            self._ids[number] = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
        return self._ids[number]

    def _end(self, trial: optuna.Trial, state: TrialState, reason: str, value: float | None = None) -> str:
        """End the trial unless another worker took it over; return the name of its state.

        It is held until its end is written: what the database refused may be called again.
        """
        frozen = self._frozen(trial)
        if is_mine := self._is_mine(frozen):
            trial.set_user_attr("reason", reason)
            self.study.tell(trial, value, state=state)
        self.held.pop(trial.number, None)
        if not is_mine:
            return frozen.state.name
        if state in FINISHED:
            drop_checkpoint(self.trials_folder, trial.number)
        return state.name


def check_study(
    config: SweepConfig, space: Space
) -> tuple[optuna.samplers.BaseSampler, optuna.pruners.BasePruner]:
    """Return sampler and pruner. Raises ConfigError where they cannot work on this space or these rungs."""
    quieten_optuna()
    num_rungs = largest(config, space, "train.epochs") * config.train.evals_per_epoch
    sampler = make_sampler(config.sampler, space.distributions, config.seed)
    return sampler, make_pruner(config.pruner, num_rungs)
