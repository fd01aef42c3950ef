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

from lora_search.config import StudyConfig, SweepConfig
from lora_search.errors import StudyError
from lora_search.history import (
    DUPLICATE,
    SURPLUS,
    attributes_of,
    check_fingerprint,
    describe,
    params_of,
    summarize,
    trial_rows,
)
from lora_search.pruning import RungPruner, make_pruner
from lora_search.sampling import draw_seed, make_sampler
from lora_search.space import Space, largest, trial_settings
from lora_search.storage import (
    explained_errors,
    locked_from_the_start,
    open_storage,
    quieten_optuna,
    worker_is_dead,
    worker_name,
)
from lora_search.study_view import StudyView
from lora_search.trial import Measurement, Stop, StudySummary, TrialRow, TrialRun

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
MAX_DUPLICATES_IN_A_ROW = 50
SIGNING_SECONDS = 0.02  # between two looks at a trial that another worker is drawing


class SweepStudy:
    """This worker's hold on the study."""

    def __init__(
        self, config: SweepConfig, space: Space, storage: RDBStorage, study: optuna.Study, folder: Path
    ) -> None:
        self.config, self.space, self.storage, self.study, self.folder = config, space, storage, study, folder
        self.held: dict[int, optuna.Trial] = {}
        self.exhausted = False
        self.worker = worker_name(os.getpid())
        self._failures: list[str] = []  # reasons of this worker's failures since its last good trial
        self._last_heartbeat = self._last_reclaim = -math.inf

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
            check_fingerprint(study, fingerprint)
            describe(study, attributes)
            sweep_study = cls(config, space, storage, study, folder)
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
        return runs

    def report(self, measurements: Sequence[Measurement]) -> None:
        """Write all measurements; none is judged before all are written. A rung is written once."""
        for m in measurements:
            trial = self.held[m.trial_number]
            frozen = self._frozen(trial)
            if not self._is_mine(frozen):
                continue
            if math.isfinite(m.perplexity) and m.rung not in frozen.intermediate_values:
                trial.report(m.perplexity, m.rung)
            seconds = frozen.user_attrs.get("train_seconds", 0.0) + m.train_seconds
            trial.set_user_attr("best_rung", m.best_rung)
            trial.set_user_attr("examples_seen", m.examples_seen)
            trial.set_user_attr("train_tokens", m.train_tokens)
            trial.set_user_attr("train_seconds", round(seconds, 3))

    def judge(self) -> list[Stop]:
        """Return the held trials to stop and why: the pruner says so, or another worker took them over."""
        trials = {t.number: t for t in self._trials()}
        held = [trials[number] for number in self.held]
        taken = {t.number: "taken over by another worker" for t in held if not self._is_mine(t)}
        judged = [t for t in held if t.number not in taken]
        reasons = taken | self._losers(list(trials.values()), judged)
        return [Stop(trial_number=number, reason=reasons[number]) for number in sorted(reasons)]

    def prune(self, stop: Stop) -> str:
        """End a held trial as PRUNED and return its state; one that was taken over is only let go."""
        self._failures.clear()
        return self._end(self.held.pop(stop.trial_number), TrialState.PRUNED, stop.reason)

    def finish(self, measurement: Measurement) -> str:
        """End a held trial and return its state: COMPLETE with its best perplexity.

        A diverged one is PRUNED: the sampler learns from it, and nothing non-finite becomes COMPLETE. It
        counts as a failure all the same, so that a sweep in which every trial diverges ends.
        """
        trial = self.held.pop(measurement.trial_number)
        if measurement.ended == "diverged" or not math.isfinite(measurement.best_perplexity):
            self._failures.append(f"trial {measurement.trial_number}: diverged: {measurement.detail}")
            return self._end(trial, TrialState.PRUNED, f"diverged: {measurement.detail}")
        self._failures.clear()
        return self._end(trial, TrialState.COMPLETE, measurement.detail, measurement.best_perplexity)

    def fail(self, number: int, reason: str) -> str:
        """End a held trial as FAIL and return its state."""
        self._failures.append(f"trial {number}: {reason}")
        return self._end(self.held.pop(number), TrialState.FAIL, reason)

    def hand_back(self, reason: str) -> None:
        """Put every held trial back, for the same command or another worker to continue."""
        for trial in self.held.values():
            if self._is_mine(self._frozen(trial)):
                trial.set_user_attr("reason", reason)
                self.storage.set_trial_state_values(self._id(trial.number), TrialState.WAITING)
        self.held.clear()

    def heartbeat(self) -> None:
        """Tell other workers that this one lives, at most once per study.heartbeat_seconds."""
        now = time.monotonic()
        if now - self._last_heartbeat < self.config.study.heartbeat_seconds:
            return
        self._last_heartbeat = now
        for number in self.held:
            self.storage.record_heartbeat(self._id(number))

    def reclaim_stale(self) -> int:
        """Put back the trials of dead workers; return how many. Fails those that were put back too often."""
        self._last_reclaim = time.monotonic()
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        # Optuna's public fail_stale_trials would end them for good; only the query behind it is needed.
        silent = set(self.storage._get_stale_trial_ids(study_id))
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        stale = [t for t in running if t.number not in self.held and self._is_abandoned(t, silent)]
        for trial in stale:
            self._put_back(trial)
        return len(stale)

    @property
    def is_finished(self) -> bool:
        """Whether no trial is left to claim: the total is reached, or the space is exhausted."""
        return self.exhausted or self.summary().finished >= self.config.study.n_trials

    def check_failures(self) -> None:
        """Raise StudyError when max_failures_in_a_row trials of this worker failed, none good between."""
        limit = self.config.study.max_failures_in_a_row
        if len(self._failures) >= limit:
            raise StudyError(
                f"study.max_failures_in_a_row: {len(self._failures)} trials failed in a row, "
                f"the last one, {self._failures[-1]}. Mend the cause, then the same command goes on."
            )

    def num_running_elsewhere(self) -> int:
        """Return how many trials other workers hold while the total is not reached."""
        states = [t.state for t in self._trials() if t.number not in self.held]
        is_through = sum(state in FINISHED for state in states) >= self.config.study.n_trials
        return 0 if is_through else states.count(TrialState.RUNNING)

    def summary(self) -> StudySummary:
        """Return where the study stands."""
        return summarize(self._trials(), self.config.study.n_trials)

    def rows(self) -> list[TrialRow]:
        """Return every trial that began or will begin, by number."""
        return trial_rows(self._trials())

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
        for _ in range(MAX_DUPLICATES_IN_A_ROW):
            if not self._has_room():
                return None
            with locked_from_the_start():
                trial = self.study.ask(self.space.distributions)
            trial.set_user_attr("worker", self.worker)
            refusal = self._refusal(trial)
            if refusal is None:
                return self._take(trial)
            self._end(trial, TrialState.FAIL, refusal)
            if refusal.startswith(SURPLUS):
                return None
        self._exhaust(f"{MAX_DUPLICATES_IN_A_ROW} draws in a row had been tried before")
        return None

    def _has_room(self) -> bool:
        """Return whether one more trial may be drawn; steer the draw to an untried point where needed."""
        trials = self._trials()
        states = [t.state for t in trials]
        if sum(state in (*FINISHED, TrialState.RUNNING) for state in states) >= self.config.study.n_trials:
            return False
        if TrialState.WAITING in states:
            return True
        has_drawn_twice = bool(trials) and str(trials[-1].user_attrs.get("reason", "")).startswith(DUPLICATE)
        num_points = self.space.num_points()
        if num_points is None or not (self._is_grid or has_drawn_twice or len(trials) >= num_points):
            return True
        untried = self.space.untried(params_of(t) for t in trials)
        if not untried:
            self._exhaust(f"all {num_points} combinations of the space have been tried")
            return False
        if self._is_grid or has_drawn_twice:
            self.study.enqueue_trial(untried[draw_seed(self.config.seed, len(trials)) % len(untried)])
        return True

    @property
    def _is_grid(self) -> bool:
        return self.config.sampler.name == "grid"

    def _refusal(self, trial: optuna.Trial) -> str | None:
        """Return why a new trial must not begin. Lower numbers win: two workers never refuse each other."""
        trials = self._when_signed(before=trial.number)
        if "settings" in trials[trial.number].user_attrs:
            return None  # it began before, and goes on
        alive = [t for t in trials if t.state != TrialState.FAIL and t.number != trial.number]
        rivals = [t for t in alive if t.number < trial.number or "settings" in t.user_attrs]
        same = next((t.number for t in rivals if params_of(t) == trial.params), None)
        if same is not None:
            return f"{DUPLICATE} trial {same}"
        if sum(t.number < trial.number for t in alive) >= self.config.study.n_trials:
            return f"{SURPLUS} another worker took the last place"
        return None

    def _when_signed(self, before: int) -> list[FrozenTrial]:
        """Return all trials, once those before this number have their parameters: a worker signs a trial when
        it has drawn them, and may be slower than the one that drew the next."""
        while True:
            trials = self._trials()
            if all(t.state != TrialState.RUNNING or self._is_drawn(t) for t in trials[:before]):
                return trials
            time.sleep(SIGNING_SECONDS)

    def _is_drawn(self, trial: FrozenTrial) -> bool:
        return "worker" in trial.user_attrs or self._is_abandoned(trial, silent=set())

    def _take(self, trial: optuna.Trial) -> TrialRun:
        settings = trial_settings(self.config, trial.params)
        trial.set_user_attr("settings", json.dumps(asdict(settings)))
        trial.set_user_attr("reason", "")
        self.storage.record_heartbeat(self._id(trial.number))
        self.held[trial.number] = trial
        folder = str(self.folder.resolve() / "trials" / str(trial.number))
        seed = draw_seed(self.config.seed, trial.number)
        return TrialRun(number=trial.number, seed=seed, settings=settings, folder=folder)

    def _exhaust(self, why: str) -> None:
        self.exhausted = True
        self.study.set_user_attr("exhausted", why)

    def _losers(self, trials: Sequence[FrozenTrial], judged: Sequence[FrozenTrial]) -> dict[int, str]:
        pruner, seed = self.study.pruner, self.config.seed
        if isinstance(pruner, RungPruner):
            return pruner.losers(trials, judged)
        # Some of Optuna's rules favour whoever is asked first: a seeded order per rung makes that anybody.
        order = sorted(judged, key=lambda t: draw_seed(seed, t.last_step or 0, t.number))
        stopped = [t for t in order if self.held[t.number].should_prune()]
        return {t.number: f"rung {t.last_step}: {self.config.pruner.name} rule" for t in stopped}

    def _put_back(self, trial: FrozenTrial) -> None:
        """Let a dead worker's trial be claimed again, or fail it where its workers die at the same place."""
        trial_id = self._id(trial.number)
        now = self.storage.get_trial(trial_id)
        if now.state != TrialState.RUNNING or now.user_attrs.get("worker") != trial.user_attrs.get("worker"):
            return  # another worker was quicker
        rung, before = now.last_step or 0, now.user_attrs.get("died_at_rung")
        retries = int(now.user_attrs.get("retries", 0)) + 1 if rung == before else 1
        is_last = retries > self.config.study.max_retries
        self.storage.record_heartbeat(trial_id)  # so that no other worker finds it stale as well
        self.storage.set_trial_user_attr(trial_id, "retries", retries)
        self.storage.set_trial_user_attr(trial_id, "died_at_rung", rung)
        reason = f"its worker died {retries} times, no rung between" if is_last else "its worker died"
        self.storage.set_trial_user_attr(trial_id, "reason", reason)
        self.storage.set_trial_state_values(trial_id, TrialState.FAIL if is_last else TrialState.WAITING)

    def _is_abandoned(self, trial: FrozenTrial, silent: set[int]) -> bool:
        worker = trial.user_attrs.get("worker")
        if worker is None:  # its worker died, or is, between asking and signing
            age = time.time() - trial.datetime_start.timestamp() if trial.datetime_start else math.inf
            return age > self.config.study.heartbeat_seconds
        return self._id(trial.number) in silent or worker_is_dead(worker)

    def _is_mine(self, trial: FrozenTrial) -> bool:
        return trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == self.worker

    def _enqueue_default(self) -> None:
        params = self.space.default_params(self.config)
        if self.config.study.first_trial_is_default and params is not None and not self._trials():
            self.study.enqueue_trial(params)

    def _trials(self) -> list[FrozenTrial]:
        """Return all trials by number, from 0 without gaps."""
        return self.study.get_trials(deepcopy=False)

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return self.storage.get_trial(self._id(trial.number))

    def _id(self, number: int) -> int:
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def _end(self, trial: optuna.Trial, state: TrialState, reason: str, value: float | None = None) -> str:
        """End the trial unless another worker took it over; return the name of its state."""
        frozen = self._frozen(trial)
        if not self._is_mine(frozen):
            return frozen.state.name
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, value, state=state)
        return state.name


def check_study(
    config: SweepConfig, space: Space
) -> tuple[optuna.samplers.BaseSampler, optuna.pruners.BasePruner]:
    """Return sampler and pruner. Raises ConfigError where they cannot work on this space or these rungs."""
    quieten_optuna()
    num_rungs = largest(config, space, "train.epochs") * config.train.evals_per_epoch
    sampler = make_sampler(config.sampler, space.distributions, config.seed)
    return sampler, make_pruner(config.pruner, num_rungs)
