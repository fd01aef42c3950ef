"""A study in Weights & Biases: a run of the base model as reference, and one with the study's summary.

The summary holds the leaderboard as a table, importance, test score and costs; every number is the study's.
Written once the study is finished, in less than two seconds; a failure is reported and ends nothing.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_search.output.tracking import (
    LOSS,
    PERPLEXITY,
    STEP_METRIC,
    first_line,
    quiet_settings,
    wandb_errors,
)
from lora_search.results.certainty import Certainty, certainty_of
from lora_search.results.importance import importances
from lora_search.results.ranking import base_of, best_of, is_final, ranked, searched_keys
from lora_search.results.verdict import state_of
from lora_search.settings.schema import SweepConfig
from lora_search.study.about import PEAK
from lora_search.study.results import read_test_score
from lora_search.trial import TrialRow

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger(__name__)

HEADS = (
    "trial",
    "state",
    "perplexity",
    "change_percent",
    "rungs",
    "best_rung",
    "train_tokens",
    "train_seconds",
)
NOTES = """\
Report: {report}
Dashboard: optuna-dashboard {storage}
Again: {command}"""


def track_study(
    config: SweepConfig, rows: Sequence[TrialRow], attributes: Mapping[str, str], folder: Path
) -> None:
    """Write both runs, unless tracking is off or the study is not finished."""
    if config.tracker.name == "none" or not is_final(rows, attributes):
        return
    try:
        import wandb
    except ImportError:
        return
    try:
        track_base(config, rows, attributes, folder)
        track_summary(config, rows, attributes, folder)
        wandb.teardown()
    except wandb_errors() as error:
        logger.warning("W&B: the study's own runs are missing: %s", first_line(error))


def track_base(
    config: SweepConfig, rows: Sequence[TrialRow], attributes: Mapping[str, str], folder: Path
) -> None:
    """Draw the base model as a level line, as far as any trial has gone."""
    base = base_of(attributes)
    run = open_run(config, attributes, folder, "base")
    run.define_metric(STEP_METRIC)
    run.define_metric("*", step_metric=STEP_METRIC)
    for examples in sorted({0, max((row.examples_seen for row in rows), default=0)}):
        run.log({STEP_METRIC: examples, PERPLEXITY: base, LOSS: math.log(base)}, step=examples)
    run.finish()


def track_summary(
    config: SweepConfig, rows: Sequence[TrialRow], attributes: Mapping[str, str], folder: Path
) -> None:
    """Write the study's tables and figures, and where its files are."""
    import wandb

    run = open_run(config, attributes, folder, "study")
    columns, cells = leaderboard_cells(rows, certainty_of(rows, folder), base_of(attributes))
    tables: dict[str, Any] = {"leaderboard": wandb.Table(columns=columns, data=cells)}
    if mattered := importances(rows):
        shown = [[one.key, one.share, one.low, one.high, one.p_value] for one in mattered]
        names = ["setting", "share", "low", "high", "p_value"]
        tables["importance"] = wandb.Table(columns=names, data=shown)
    run.log(tables)
    run.summary.update(figures(rows, attributes))
    if config.tracker.log_adapter and (folder / "best/adapter").is_dir():
        artifact = wandb.Artifact(f"{config.study.name}-best", type="adapter")
        artifact.add_dir(str(folder / "best/adapter"))
        run.log_artifact(artifact)
    run.finish()


def open_run(config: SweepConfig, attributes: Mapping[str, str], folder: Path, kind: str) -> "Run":
    """Return a run of the study itself, in its folder."""
    import wandb

    from lora_search.settings.secrets import redact

    name, study_id = f"{config.study.name}-{kind}", attributes.get("study_id", "")
    is_online = config.tracker.name == "wandb"
    return wandb.init(
        project=config.tracker.project,
        entity=config.tracker.entity,
        dir=str(folder),
        id=f"{config.study.name}-{study_id}-{kind}" if study_id else name,
        name=name,
        group=config.study.name,
        job_type=kind,
        tags=[kind],
        notes=NOTES.format(
            report=folder / "report.html",
            storage=redact(config.study.storage),
            command=attributes.get("command", ""),
        ),
        config=json.loads(attributes.get("settings", "{}")) | tracked_facts(attributes),
        resume="allow" if is_online else None,
        reinit="create_new",
        settings=quiet_settings(is_online),
    )


def tracked_facts(attributes: Mapping[str, str]) -> dict[str, str]:
    """Return the facts on code and data for every run: the commit, and the counts of the rows."""
    kept = {key: value for key, value in attributes.items() if key.startswith("data.")}
    return {"git_commit": attributes.get("git_commit", ""), **kept}


def leaderboard_cells(
    rows: Sequence[TrialRow], certainty: Certainty, base: float
) -> tuple[list[str], list[list[object]]]:
    """Return heads and rows of the leaderboard, the base first, with unrounded numbers."""
    keys = searched_keys(rows)
    cells: list[list[object]] = [["base", "", base, 0.0, 0, 0, 0, 0.0, *("" for _ in keys)]]
    best = best_of(rows)
    for row in ranked(rows):
        change = None if row.perplexity is None else 100 * (row.perplexity / base - 1)
        state = "best" if row is best else state_of(row, certainty)
        result = [str(row.number), state, row.perplexity, change, len(row.perplexities), row.best_rung]
        values = [str(row.params.get(key, "")) for key in keys]
        cells.append([*result, row.train_tokens, row.train_seconds, *values])
    return [*HEADS, *keys], cells


def figures(rows: Sequence[TrialRow], attributes: Mapping[str, str]) -> dict[str, object]:
    """Return the results of the study."""
    best, base, test = best_of(rows), base_of(attributes), read_test_score(attributes)
    found: dict[str, object] = {
        "base_perplexity": base,
        "trials": len(rows),
        "pruned": sum(row.state == "PRUNED" for row in rows),
        "train_tokens": sum(row.train_tokens for row in rows),
        "train_seconds": sum(row.train_seconds for row in rows),
        "hours": float(attributes.get("hours over all starts", 0)),
    }
    if best is not None and best.perplexity is not None:
        found |= {"best_trial": best.number, "best_perplexity": best.perplexity}
        found["change_percent"] = 100 * (best.perplexity / base - 1)
    if test is not None:
        found |= {"test_perplexity": test.perplexity, "test_base_perplexity": test.base_perplexity}
    if PEAK in attributes:
        found[PEAK] = int(attributes[PEAK])
    return found
