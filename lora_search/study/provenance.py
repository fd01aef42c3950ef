"""The attributes that record how a study was run, so that it can be repeated."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import optuna

from lora_search.data.rows import Splits
from lora_search.settings.schema import SweepConfig, as_dict
from lora_search.settings.secrets import redact
from lora_search.study.fingerprint import flat
from lora_search.trial import StudySummary

LENGTHS = "length_histogram"
PEAK = "peak_memory_bytes"
BUCKETS = 24
KEPT = "lora_search:about"  # system attribute: all that optuna-dashboard need not show
SHOWN = ("command", "base_model_name", "git_commit", "data.train", "data.validation", "data.test")
LIBRARIES = ("torch", "transformers", "peft", "optuna", "hydra-core", "datasets", "wandb", "sqlalchemy")


def attributes(
    config: SweepConfig,
    sweep_name: str,
    command: str,
    source: str,
    splits: Splits,
    content: Mapping[str, str],
) -> dict[str, str]:
    """Return the attributes that record how the study is run, without secrets, the same in all workers.

    ``content``: the digests of the files that the settings name.
    """
    shared = replace(config, launcher=replace(config.launcher, worker=None))
    return {
        "study": config.study.name,
        "sweep": sweep_name,
        "command": redact(command),
        "base_model": source,
        "base_model_name": config.model.path,
        "base_revision": content.get("content.commit", ""),
        "base_weights": content.get("content.weights", ""),
        "max_length": str(splits.max_length),
        "git_commit": _git_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        **flat("data", splits.counts),
        "settings": json.dumps(as_dict(shared)),  # JSON keeps their types
        **{f"setting/{k}": v for k, v in flat("sweep", as_dict(shared)).items()},
        **{f"version/{name}": version(name) for name in LIBRARIES},
    }


def length_histogram(lengths: Sequence[int]) -> dict[str, object]:
    """Return how many rows have up to width, 2 width, ... tokens."""
    width = max(1, -(-max(lengths) // BUCKETS))
    counts = [0] * (-(-max(lengths) // width))
    for length in lengths:
        counts[(length - 1) // width] += 1
    return {"width": width, "counts": counts}


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


def attributes_of(study: optuna.Study) -> dict[str, str]:
    """Return what people see of the study, and what is kept out of their sight; an older study has it all in
    sight."""
    known = study.user_attrs | _kept(study)
    return {key: str(value) for key, value in known.items()}


def _kept(study: optuna.Study) -> dict[str, str]:
    kept = study._storage.get_study_system_attrs(study._study_id).get(KEPT)
    return {key: str(value) for key, value in kept.items()} if isinstance(kept, dict) else {}


def describe(study: optuna.Study, attributes: Mapping[str, str]) -> None:
    """Store the attributes that are new or have changed."""
    if study.metric_names is None:
        study.set_metric_names(["validation perplexity"])
    stored, kept = study.user_attrs, _kept(study)
    for key, value in attributes.items():
        if key in SHOWN and stored.get(key) != value:
            study.set_user_attr(key, value)
    wanted = kept | {key: value for key, value in attributes.items() if key not in SHOWN}
    if wanted != kept:
        study._storage.set_study_system_attr(study._study_id, KEPT, wanted)


def standing(summary: StudySummary, is_finished: bool) -> str:
    """Return the progress of the study in words, with the setting to raise for more."""
    finished, n_trials = summary.finished, summary.n_trials
    text = f"{finished} of {n_trials} trials done" if n_trials else f"{finished} trials done"
    text = "; ".join([text, *(f"{limit.key} {limit} spent" for limit in summary.limits)])
    if n_trials is not None and finished > n_trials:
        return f"{text}: study.n_trials is lower than the number of finished trials; all are kept"
    reached = next((limit.key for limit in summary.limits if limit.is_reached), None)
    more = "study.n_trials" if is_finished else reached
    return f"{text}; raise {more} to continue" if more else text
