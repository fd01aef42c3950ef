"""Curves in Weights & Biases: one run per trial, against examples seen. The one home of wandb.

A tracker watches and never decides. When the first run cannot be opened, the sweep stops before it trains;
whatever fails later is counted and logged once, and training continues. Command lines (they may
hold a password), code, packages and machine statistics are not collected. Cost: about 3 ms per logged rung;
opening a run takes a third of a second, in a thread of its own while its trial trains.
"""

import logging
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_search.errors import ConfigError
from lora_search.failures import first_line
from lora_search.settings.overlay import trial_settings
from lora_search.settings.schema import SweepConfig
from lora_search.settings.secrets import redact
from lora_search.trial import Measurement, TrialRun

if TYPE_CHECKING:
    from wandb import Run, Settings

logger = logging.getLogger(__name__)

BLOCK_BYTES, HEADER_BYTES = 32768, 7  # of W&B's offline files
STEP_METRIC = "examples_seen"
LOSS, PERPLEXITY = "validation/loss", "validation/perplexity"
FINISH_TIMEOUT_SECONDS = 30.0  # online: a dead network holds up the other trials no longer than this
OPENING_TIMEOUT_SECONDS = 30.0  # nor than this: a worker that is silent for longer loses its trials


class Tracker:
    """Receives the curves of every trial; this one drops them. `log` and `finish` never raise because of the
    tracking service."""

    def begin(self, base_perplexity: float, facts: Mapping[str, str]) -> None:
        """Hear where every trial starts, and what is said in all of their runs."""

    def start(self, run: TrialRun) -> None:
        """Open the trial's curves, or continue them if the trial was resumed."""

    def log(self, measurement: Measurement) -> None:
        """Record one rung and the optimizer steps that led to it."""

    def finish(self, trial_number: int, state: str, reason: str) -> None:
        """Close the trial's curves with its final state."""

    def close(self) -> None:
        """Close what is still open; the sweep ends or was interrupted."""


class NoTracker(Tracker):
    """tracker=none."""


def make_tracker(config: SweepConfig, extra: Mapping[str, object]) -> Tracker:
    """Return the tracker the settings ask for; ``extra`` goes into the config of every run."""
    if config.tracker.name == "none":
        return NoTracker()
    return WandbTracker(config, extra)


class WandbTracker(Tracker):
    """One W&B run per trial, all of them live at once in this process."""

    def __init__(self, config: SweepConfig, extra: Mapping[str, object]) -> None:
        self._config, self._extra = config, dict(extra)
        self._base: float | None = None
        self._runs: dict[int, Future[Run]] = {}
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="wandb-open")
        self._best: dict[int, Measurement] = {}  # the last measurement knows the best so far
        self._failures = 0
        self._files: list[Path] = []  # of the offline runs
        self._has_started = self._is_closed = False
        check_usable(config.tracker.name)
        self._opener.submit(start_service, config.tracker.name == "wandb")
        self._errors = wandb_errors()
        # wandb keeps logs with its runs: on a full disk each of their lines would be a traceback.
        logging.raiseExceptions = False

    def begin(self, base_perplexity: float, facts: Mapping[str, str]) -> None:
        """Hear where every trial starts, and what is said in all of their runs."""
        self._base = base_perplexity
        self._extra |= facts

    def start(self, run: TrialRun) -> None:
        """Open the trial's run. A failure of the first one is wrong input; a later one is only counted."""
        opening = self._opener.submit(self._open, run)
        try:
            if not self._has_started:
                opening.result()
        except self._errors as error:
            rule = f"W&B did not start ({first_line(error)})"
            remedy = "Set tracker=wandb_offline or tracker=none to search without it."
            raise ConfigError("tracker.name", self._config.tracker.name, rule, remedy) from error
        self._runs[run.number] = opening
        self._has_started = True

    def _opened(self, trial_number: int) -> "Run | None":
        """Return the trial's run once it is open; None if it could not be opened, which is reported once."""
        opening = self._runs.get(trial_number)
        if opening is None:
            return None
        with self._survive(f"opening the run of trial {trial_number}"):
            return opening.result(OPENING_TIMEOUT_SECONDS)
        self._runs.pop(trial_number)
        return None

    def _open(self, run: TrialRun) -> "Run":
        live = open_trial(self._config, run, self._extra)
        if self._config.tracker.name != "wandb":
            self._files.append(Path(live.settings.sync_file))
        live.define_metric(STEP_METRIC)
        live.define_metric("*", step_metric=STEP_METRIC)
        for metric in (LOSS, PERPLEXITY):
            live.define_metric(metric, step_metric=STEP_METRIC, summary="min")
        if self._base is not None and not run.perplexities and live.starting_step == 0:
            start = {STEP_METRIC: 0, LOSS: math.log(self._base), PERPLEXITY: self._base}
            live.log(start, step=0)  # an untrained adapter changes nothing
        return live

    def log(self, measurement: Measurement) -> None:
        """Log each optimizer step, and the rung's validation at the examples seen by then."""
        self._best[measurement.trial_number] = measurement
        live = self._opened(measurement.trial_number)
        if live is None:
            return
        with self._survive(f"logging trial {measurement.trial_number}"):
            for examples_seen, row in history_rows(measurement):
                if examples_seen >= live.starting_step:  # a resumed online run has the earlier ones
                    live.log({STEP_METRIC: examples_seen, **row}, step=examples_seen)

    def finish(self, trial_number: int, state: str, reason: str) -> None:
        """Write the outcome into the run's summary and close it."""
        live = self._opened(trial_number)
        self._runs.pop(trial_number, None)
        last = self._best.pop(trial_number, None)
        if live is None:
            return
        with self._survive(f"closing the run of trial {trial_number}"):
            live.summary.update({"state": state, "reason": reason, **best_so_far(last, self._base)})
            if state == "PRUNED":
                live.tags = (*(live.tags or ()), "pruned")
            live.finish(exit_code=0 if state in ("COMPLETE", "PRUNED") else 1)

    def close(self) -> None:
        """Close the runs of interrupted trials and wait until every file is complete."""
        import wandb

        if self._is_closed:
            return
        self._is_closed = True
        for trial_number, opening in list(self._runs.items()):
            if opening.cancel():
                continue
            self.finish(trial_number, "INTERRUPTED", "the sweep stopped before the trial ended")
        self._opener.shutdown()
        with self._survive("stopping its service"):
            wandb.teardown()  # run.finish() returns before the file on disk is complete
        broken: list[Path] = []
        with self._survive("reading its files"):
            broken = [path for path in self._files if not is_whole(path)]
        if self._failures or broken:
            where = f" and {len(broken)} run files are not whole, the first is {broken[0]}" if broken else ""
            text = "W&B: %d calls failed%s; the study and the report are complete."
            logger.warning(text, self._failures, where)

    @contextmanager
    def _survive(self, what: str) -> Iterator[None]:
        """Count what goes wrong inside wandb instead of passing it on to the trials."""
        try:
            yield
        except self._errors as error:
            self._failures += 1
            if self._failures == 1:
                logger.warning("W&B failed while %s: %s. Training continues.", what, first_line(error))


def open_run(
    config: SweepConfig,
    study_id: str,
    part: str,
    folder: str,
    *,
    kind: str,
    tags: Sequence[str],
    facts: Mapping[str, object],
    notes: str | None = None,
) -> "Run":
    """Return a run in the study's group, written to the folder. A second run of the same ``part`` continues
    the first: online it resumes, offline `wandb sync` joins the two by their id."""
    import wandb

    Path(folder).mkdir(parents=True, exist_ok=True)  # else wandb writes to the temporary folder
    is_online, name = config.tracker.name == "wandb", config.study.name
    return wandb.init(
        project=config.tracker.project, entity=config.tracker.entity, dir=folder, group=name,
        id="-".join(filter(None, [name, study_id, part])), name=f"{name}-{part}", job_type=kind, tags=[*tags],
        notes=notes, config={**facts}, resume="allow" if is_online else None, reinit="create_new",
        settings=quiet_settings(is_online),
    )  # fmt: skip


def open_trial(
    config: SweepConfig, run: TrialRun, extra: Mapping[str, object], tags: Sequence[str] = ()
) -> "Run":
    """Return a trial's run. The trial with the sweep's own settings is tagged default."""
    default = ["default"] if run.settings == trial_settings(config, {}) else []
    numbers = {"trial": run.number, "trial_seed": run.seed, "study_id": run.study_id}
    facts = {**asdict(run.settings), **extra, **numbers}
    part, tags = str(run.number), [*default, *tags]
    return open_run(config, run.study_id, part, run.folder, kind="trial", tags=tags, facts=facts)


def facts_of_sweep(config: SweepConfig) -> dict[str, object]:
    """Return the facts of a sweep for the config of each of its runs, without secrets."""
    return {"model": redact(config.model.path), "data": redact(config.data.name), "seed": config.seed}


def is_whole(path: Path) -> bool:
    """Return whether an offline file ends with its run's exit: the process that writes it does not say what
    the disk refuses. It is a LevelDB log: blocks of records behind checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw = path.read_bytes() if path.exists() else b""
    position, kind, message = HEADER_BYTES, 0, b""
    while position + HEADER_BYTES <= len(raw):
        if (left := BLOCK_BYTES - position % BLOCK_BYTES) < HEADER_BYTES:
            position += left
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", raw, position)
        begins = kind in (1, 2)  # a full record, or the first part of one
        start = position + HEADER_BYTES
        message = (b"" if begins else message) + raw[start : start + length]
        position = start + length
    has_ended = position == len(raw) and kind in (1, 4)  # a full record, or the last part of one
    return has_ended and Record.FromString(message).HasField("exit")


def wandb_errors() -> tuple[type[Exception], ...]:
    """Return what wandb's calls raise; the last three when its service process is gone, DecodeError where a
    run's file is damaged."""
    import wandb  # in functions only: it takes a second to import, and tracker=none never needs it
    from google.protobuf.message import DecodeError
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    of_its_service = MailboxClosedError, HandleAbandonedError, WandbServiceConnectionError
    return wandb.Error, ValueError, TypeError, OSError, DecodeError, *of_its_service


def check_usable(tracker_name: str) -> None:
    """Raise unless wandb can be imported and, for online runs, somebody is logged in."""
    key, offline = "tracker.name", "Or keep tracker=wandb_offline and run `wandb sync` later."
    try:
        import wandb
    except ImportError as error:
        remedy = "Run `pip install wandb`, or set tracker=none."
        raise ConfigError(key, tracker_name, f"needs the wandb package ({error})", remedy) from error
    if tracker_name == "wandb" and not wandb.login(prompt=False, verify=False):
        remedy = f"Run `wandb login` or set WANDB_API_KEY. {offline}"
        raise ConfigError(key, tracker_name, "needs a W&B login", remedy)


def start_service(is_online: bool) -> None:
    """Start wandb's service process while data and model are read. If that fails, the first run fails and
    reports it."""
    import wandb

    with suppress(*wandb_errors()):
        wandb.setup(quiet_settings(is_online))


def quiet_settings(is_online: bool) -> "Settings":
    """Return settings that keep the terminal clean and take nothing but what we log."""
    import wandb

    return wandb.Settings(
        mode="online" if is_online else "offline",
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        finish_timeout=FINISH_TIMEOUT_SECONDS if is_online else 0.0,
        symlink=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def history_rows(measurement: Measurement) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (examples seen, values) in rising order; the validation joins the last optimizer step's row."""
    for step in measurement.steps:
        train = {"train/loss": step.loss, "train/lr": step.lr, "train/grad_norm": step.grad_norm}
        yield step.examples_seen, train
    quality = {LOSS: measurement.validation_loss, PERPLEXITY: measurement.perplexity}
    amounts = {name: getattr(measurement, name) for name in ("train_tokens", "tokens_per_second")}
    yield measurement.examples_seen, quality | amounts


def best_so_far(last: Measurement | None, base: float | None = None) -> dict[str, Any]:
    """Return the summary's best perplexity, its rung and change, or nothing before the first finite rung."""
    if last is None or last.best_rung == 0:
        return {}
    change = {} if base is None else {"change_percent": 100 * (last.best_perplexity / base - 1)}
    return {"best_perplexity": last.best_perplexity, "best_rung": last.best_rung, **change}
