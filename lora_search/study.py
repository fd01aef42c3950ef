"""The study in SQL, the only truth about what ran: open, claim, report, judge, finish, hand back. Knows no torch.

A trial that was interrupted stays the same trial: RUNNING goes back to WAITING, keeps number, parameters and
reports, and whoever claims it next continues from its checkpoint.
"""

import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from lora_search.config import StudyConfig, SweepConfig, redact
from lora_search.errors import ConfigError, FingerprintError, StudyError
from lora_search.pruning import RungPruner, best_until, make_pruner
from lora_search.sampling import make_sampler
from lora_search.space import Space, largest, trial_settings
from lora_search.trial import Measurement, Stop, StudySummary, TrialRow, TrialRun

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
GRACE_HEARTBEATS = (
    4  # a worker silent for so many heartbeats is taken for dead (optuna#5470: too short kills the living)
)
MAX_RETRIES = 3
MAX_DUPLICATES_IN_A_ROW = 50


class SweepStudy:
    """This worker's hold on the study."""

    def __init__(
        self, config: SweepConfig, space: Space, storage: RDBStorage, study: optuna.Study, folder: Path
    ) -> None:
        self.config, self.space, self.storage, self.study, self.folder = config, space, storage, study, folder
        self.held: dict[int, optuna.Trial] = {}
        self.exhausted = False
        self._last_heartbeat = 0.0

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
        _quieten_optuna()
        storage = open_storage(config.study)
        num_rungs = largest(config, space, "train.epochs") * config.train.evals_per_epoch
        study = optuna.create_study(
            storage=storage,
            study_name=config.study.name,
            direction="minimize",
            load_if_exists=True,
            pruner=make_pruner(config.pruner, num_rungs),
        )
        num_trials = len(study.get_trials(deepcopy=False))
        study.sampler = make_sampler(config.sampler, space.distributions, config.seed, num_trials)
        _check_fingerprint(study, fingerprint)
        study.set_metric_names(["validation perplexity"])
        for key, value in attributes.items():
            study.set_user_attr(key, value)
        sweep_study = cls(config, space, storage, study, folder)
        sweep_study.reclaim_stale()
        sweep_study._enqueue_default()
        return sweep_study

    def claim(self, max_trials: int) -> list[TrialRun]:
        """Return up to so many trials to train, never beyond n_trials in all; interrupted ones come first."""
        runs: list[TrialRun] = []
        duplicates = 0
        while len(runs) < max_trials and self._remaining() > 0 and not self.exhausted:
            trial = self.study.ask(self.space.distributions)
            original = self._original(trial)
            if original is not None:
                self._end(trial, TrialState.FAIL, f"duplicate of trial {original}")
                duplicates += 1
                self.exhausted = duplicates >= MAX_DUPLICATES_IN_A_ROW
                continue
            duplicates = 0
            self.held[trial.number] = trial
            runs.append(self._run(trial))
        return runs

    def report(self, measurements: Sequence[Measurement]) -> None:
        """Write all measurements; none is judged before all are written."""
        for m in measurements:
            trial = self.held[m.trial_number]
            if np.isfinite(m.perplexity) and m.rung not in self._frozen(trial).intermediate_values:
                trial.report(m.perplexity, m.rung)
            progress = {
                "best_rung": m.best_rung,
                "examples_seen": m.examples_seen,
                "train_tokens": m.train_tokens,
            }
            for key, value in progress.items():
                trial.set_user_attr(key, value)
            seconds = trial.user_attrs.get("train_seconds", 0.0) + m.train_seconds
            trial.set_user_attr("train_seconds", round(seconds, 3))

    def judge(self) -> list[Stop]:
        """Return the held trials to stop, with reasons."""
        stops = []
        for number, trial in sorted(self.held.items()):
            pruner, frozen = self.study.pruner, self._frozen(trial)
            if isinstance(pruner, RungPruner):
                reason = pruner.verdict(self.study, frozen)
            else:
                reason = (
                    f"{type(pruner).__name__} at rung {frozen.last_step}" if trial.should_prune() else None
                )
            if reason is not None:
                stops.append(Stop(trial_number=number, reason=reason))
        return stops

    def prune(self, stop: Stop) -> None:
        """End a held trial as PRUNED."""
        self._end(self.held.pop(stop.trial_number), TrialState.PRUNED, stop.reason)

    def finish(self, measurement: Measurement) -> str:
        """End a held trial: COMPLETE with its best perplexity, FAIL if it diverged; return the state's name."""
        trial = self.held.pop(measurement.trial_number)
        if measurement.ended == "diverged":
            self._end(trial, TrialState.FAIL, f"diverged: {measurement.detail}")
            return "FAIL"
        self._end(trial, TrialState.COMPLETE, measurement.detail, measurement.best_perplexity)
        return "COMPLETE"

    def fail(self, number: int, reason: str) -> None:
        """End a held trial as FAIL."""
        self._end(self.held.pop(number), TrialState.FAIL, reason)

    def hand_back(self, reason: str) -> None:
        """Put every held trial back, for the same command or another worker to continue."""
        for trial in self.held.values():
            trial.set_user_attr("reason", reason)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        self.held.clear()

    def heartbeat(self) -> None:
        """Tell other workers that this one lives; at most once per study.heartbeat_seconds."""
        now = time.monotonic()
        if now - self._last_heartbeat < self.config.study.heartbeat_seconds:
            return
        self._last_heartbeat = now
        for trial in self.held.values():
            self.storage.record_heartbeat(trial._trial_id)

    def reclaim_stale(self) -> int:
        """Put back the trials of dead workers; return how many. Fails those that were put back too often."""
        # Optuna's public fail_stale_trials would end them for good; the query behind it is all that is needed.
        silent = set(self.storage._get_stale_trial_ids(self.study._study_id))
        reclaimed = 0
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.number in self.held or not (frozen._trial_id in silent or _worker_is_dead(frozen)):
                continue
            retries = int(frozen.user_attrs.get("retries", 0)) + 1
            self.storage.set_trial_user_attr(frozen._trial_id, "retries", retries)
            state = TrialState.WAITING if retries <= MAX_RETRIES else TrialState.FAIL
            reason = "its worker died" if retries <= MAX_RETRIES else f"its worker died {retries} times"
            self.storage.set_trial_user_attr(frozen._trial_id, "reason", reason)
            self.storage.set_trial_state_values(frozen._trial_id, state)
            reclaimed += 1
        return reclaimed

    @property
    def is_finished(self) -> bool:
        """Whether no trial is left to claim: the total is reached, or the space is exhausted."""
        return self.exhausted or self.summary().finished >= self.config.study.n_trials

    def check_failures(self) -> None:
        """Raise StudyError when the last max_failures_in_a_row trials all failed."""
        ended = [
            t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished() and not _is_duplicate(t)
        ]
        last = sorted(
            ended, key=lambda t: t.datetime_complete or t.datetime_start
        )[  # type: ignore[arg-type,return-value]
            -self.config.study.max_failures_in_a_row :
        ]
        if len(last) == self.config.study.max_failures_in_a_row and all(
            t.state == TrialState.FAIL for t in last
        ):
            reason = last[-1].user_attrs.get("reason", "unknown")
            raise StudyError(
                f"study.max_failures_in_a_row: {len(last)} trials failed in a row, the last one: {reason}."
            )

    def summary(self) -> StudySummary:
        """Return where the study stands."""
        trials = [t for t in self.study.get_trials(deepcopy=False) if not _is_duplicate(t)]
        counts = {state: sum(t.state == state for t in trials) for state in TrialState}
        best = min(
            (t for t in trials if t.state == TrialState.COMPLETE),
            key=lambda t: t.value or np.inf,
            default=None,
        )
        return StudySummary(
            finished=counts[TrialState.COMPLETE] + counts[TrialState.PRUNED],
            n_trials=self.config.study.n_trials,
            complete=counts[TrialState.COMPLETE],
            pruned=counts[TrialState.PRUNED],
            failed=counts[TrialState.FAIL],
            running=counts[TrialState.RUNNING],
            best_number=best.number if best else None,
            best_perplexity=best.value if best else None,
        )

    def rows(self) -> list[TrialRow]:
        """Return every trial but duplicates, by number."""
        return [_row(t) for t in self.study.get_trials(deepcopy=False) if not _is_duplicate(t)]

    def attributes(self) -> dict[str, str]:
        """Return what the study knows about itself."""
        return {key: str(value) for key, value in self.study.user_attrs.items()}

    def remember(self, key: str, measure: Callable[[], str]) -> str:
        """Return a study attribute, measured now if it is not there yet."""
        if key not in self.study.user_attrs:
            self.study.set_user_attr(key, measure())
        return str(self.study.user_attrs[key])

    @staticmethod
    def read(config: StudyConfig) -> tuple[list[TrialRow], dict[str, str]]:
        """Return trials and attributes of a study without changing it."""
        _quieten_optuna()
        try:
            study = optuna.load_study(study_name=config.name, storage=open_storage(config))
        except KeyError:
            raise ConfigError(
                "study.name", config.name, "must be a study in study.storage", "Run the sweep first."
            ) from None
        rows = [_row(t) for t in study.get_trials(deepcopy=False) if not _is_duplicate(t)]
        return rows, {key: str(value) for key, value in study.user_attrs.items()}

    def _enqueue_default(self) -> None:
        params = self.space.default_params(self.config)
        if self.config.study.first_trial_is_default and params and not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(params)

    def _remaining(self) -> int:
        states = [t.state for t in self.study.get_trials(deepcopy=False)]
        taken = sum(state in FINISHED or state == TrialState.RUNNING for state in states)
        return self.config.study.n_trials - taken

    def _original(self, trial: optuna.Trial) -> int | None:
        """Return the number of an earlier trial with the same parameters."""
        others = self.study.get_trials(deepcopy=False)
        same = [t.number for t in others if t.number < trial.number and t.params == trial.params]
        alive = [n for n in same if others[n].state != TrialState.FAIL]
        return alive[0] if alive else None

    def _run(self, trial: optuna.Trial) -> TrialRun:
        settings = trial_settings(self.config, trial.params)
        trial.set_user_attr("settings", json.dumps(asdict(settings)))
        trial.set_user_attr("worker", _worker_name(os.getpid()))
        self.storage.record_heartbeat(trial._trial_id)
        seed = int(np.random.SeedSequence((self.config.seed, trial.number)).generate_state(1)[0])
        folder = str(self.folder.resolve() / "trials" / str(trial.number))
        return TrialRun(number=trial.number, seed=seed, settings=settings, folder=folder)

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return self.storage.get_trial(trial._trial_id)

    def _end(self, trial: optuna.Trial, state: TrialState, reason: str, value: float | None = None) -> None:
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, value, state=state)


def open_storage(config: StudyConfig) -> RDBStorage:
    """Return the SQL storage. Raises ConfigError or StudyError, without the password, where it cannot be opened."""
    remedy = "Try sqlite:///runs/lora_search.db"
    try:
        url = make_url(config.storage)
        options: dict[str, object] = {"pool_pre_ping": True}
        if url.get_backend_name() == "sqlite":
            options = {"connect_args": {"timeout": 60}}
            if url.database:
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        storage = RDBStorage(
            config.storage,
            engine_kwargs=options,
            heartbeat_interval=config.heartbeat_seconds,
            grace_period=GRACE_HEARTBEATS * config.heartbeat_seconds,
        )
    except (ImportError, ValueError, ArgumentError) as error:
        cause = redact(str(error).splitlines()[0])
        raise ConfigError(
            "study.storage", redact(config.storage), f"cannot be used ({cause})", remedy
        ) from None
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
        cause = redact(str(error).splitlines()[0])
        raise ConfigError(
            "study.storage", redact(config.storage), f"must be reachable ({cause})", remedy
        ) from None
    if url.get_backend_name() == "sqlite":
        _use_wal(storage)
    return storage


def _quieten_optuna() -> None:
    """Silence what users can do nothing about: heartbeats and metric names are used on purpose."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.logging.disable_propagation()
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings(
        "ignore", message="Heartbeat of storage is supposed to be used with Study.optimize"
    )


def _use_wal(storage: RDBStorage) -> None:
    """Let readers (the dashboard) and the writer work at once."""

    def set_pragmas(connection: object, _: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    event.listen(storage.engine, "connect", set_pragmas)
    storage.engine.dispose()


def _check_fingerprint(study: optuna.Study, fingerprint: Mapping[str, str]) -> None:
    stored = study.user_attrs.get("fingerprint")
    if stored is None:
        study.set_user_attr("fingerprint", dict(fingerprint))
        return
    keys = sorted({*stored, *fingerprint})
    changed = [
        f"{k}: {stored.get(k)} -> {fingerprint.get(k)}" for k in keys if stored.get(k) != fingerprint.get(k)
    ]
    if changed:
        listed = "\n  ".join(changed)
        raise FingerprintError(
            f"study.name: {study.study_name!r} was started with other settings:\n  {listed}\n"
            "Choose a new study.name, or put these back. Free to change: study.n_trials, engine.slots, "
            "engine.tokens_per_pass, engine.device, tracker, study.heartbeat_seconds."
        )


def _row(trial: FrozenTrial) -> TrialRow:
    best = best_until(trial, 2**31)
    attrs = trial.user_attrs
    return TrialRow(
        number=trial.number,
        state=trial.state.name,
        perplexity=best if np.isfinite(best) else None,
        best_rung=attrs.get("best_rung"),
        params=dict(trial.params),
        perplexities=dict(sorted(trial.intermediate_values.items())),
        reason=attrs.get("reason", ""),
        examples_seen=attrs.get("examples_seen", 0),
        train_tokens=attrs.get("train_tokens", 0),
        train_seconds=attrs.get("train_seconds", 0.0),
    )


def _is_duplicate(trial: FrozenTrial) -> bool:
    return str(trial.user_attrs.get("reason", "")).startswith("duplicate of")


def _worker_name(pid: int) -> str:
    """Return host:pid:start, unlike any other process's even after the pid is used again."""
    stat = Path(f"/proc/{pid}/stat")
    started = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else "0"
    return f"{platform.node()}:{pid}:{started}"


def _worker_is_dead(trial: FrozenTrial) -> bool:
    """Return whether the trial's worker ran on this host and runs no more."""
    host, _, rest = str(trial.user_attrs.get("worker", "")).partition(":")
    pid = rest.partition(":")[0]
    if host != platform.node() or not pid.isdigit() or not Path("/proc").is_dir():
        return False
    return _worker_name(int(pid)) != trial.user_attrs["worker"]
