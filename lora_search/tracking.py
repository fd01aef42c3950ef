"""Weights & Biases: one run per trial, curves against examples seen. The one home of wandb; offline by default."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import wandb

from lora_search.config import SweepConfig
from lora_search.errors import ConfigError
from lora_search.trial import Measurement, TrialRun


class Tracker(Protocol):
    """Where the curves of trials go."""

    def start(self, run: TrialRun) -> None: ...
    def log(self, measurement: Measurement) -> None: ...
    def finish(self, trial_number: int, state: str, reason: str) -> None: ...
    def close(self) -> None: ...


class NoTracker:
    """Tracks nothing."""

    def start(self, run: TrialRun) -> None: ...
    def log(self, measurement: Measurement) -> None: ...
    def finish(self, trial_number: int, state: str, reason: str) -> None: ...
    def close(self) -> None: ...


class WandbTracker:
    """Keeps one live W&B run per trial in training. A resumed trial writes on under the same id."""

    def __init__(self, config: SweepConfig, mode: str, extra: Mapping[str, object]) -> None:
        self.study_name, self.project, self.entity = config.study.name, config.tracker.project, config.tracker.entity
        self.mode, self.extra = mode, dict(extra)
        self.runs: dict[int, wandb.Run] = {}

    def start(self, run: TrialRun) -> None:
        Path(run.folder).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, x_disable_stats=True, save_code=False, x_disable_meta=True
        )
        try:
            live = wandb.init(
                project=self.project, entity=self.entity, dir=run.folder, mode=self.mode,  # type: ignore[arg-type]
                id=f"{self.study_name}-{run.number}", name=f"{self.study_name}/{run.number}", group=self.study_name,
                job_type="trial", config={**asdict(run.settings), **self.extra, "trial": run.number},
                reinit="create_new", resume="allow" if self.mode == "online" else None, settings=settings,
            )  # fmt: skip
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            cause = str(error).splitlines()[0]
            remedy = "Run `wandb login`, or use tracker=wandb_offline."
            raise ConfigError("tracker.name", "wandb", f"needs a W&B account ({cause})", remedy) from None
        live.define_metric("examples_seen")
        live.define_metric("*", step_metric="examples_seen")
        self.runs[run.number] = live

    def log(self, measurement: Measurement) -> None:
        live = self.runs[measurement.trial_number]
        for step in measurement.steps:
            curve = {"train/loss": step.loss, "train/lr": step.lr, "train/grad_norm": step.grad_norm}
            live.log({"examples_seen": step.examples_seen, **curve})
        live.log(
            {
                "examples_seen": measurement.examples_seen,
                "rung": measurement.rung,
                "validation/loss": measurement.validation_loss,
                "validation/perplexity": measurement.perplexity,
                "tokens_per_second": measurement.tokens_per_second,
            }
        )
        live.summary["best_perplexity"] = measurement.best_perplexity
        live.summary["best_rung"] = measurement.best_rung

    def finish(self, trial_number: int, state: str, reason: str) -> None:
        live = self.runs.pop(trial_number)
        live.summary["state"], live.summary["reason"] = state, reason
        live.finish(exit_code=1 if state == "FAIL" else 0)

    def close(self) -> None:
        """Close what is still open, e.g. after Ctrl-C."""
        for number in list(self.runs):
            self.finish(number, "INTERRUPTED", "handed back")


def make_tracker(config: SweepConfig, extra: Mapping[str, object]) -> Tracker:
    """Return the tracker of the sweep; ``extra`` goes into every run's config."""
    if config.tracker.name == "none":
        return NoTracker()
    os.environ.setdefault("WANDB_SILENT", "true")
    return WandbTracker(config, "offline" if config.tracker.name == "wandb_offline" else "online", extra)
