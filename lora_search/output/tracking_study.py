"""A study in Weights & Biases: a run of the base model as reference, one with the study's summary, one with a
confirmation; the best trial and those tied with it get a tag.

The summary holds the leaderboard as a table, importance, scores and costs; every number is the study's.
Written once the study is finished, about two seconds and a third for each tag; a failure is reported and ends
nothing.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_search.failures import first_line
from lora_search.output.tracking import (
    LOSS,
    PERPLEXITY,
    STEP_METRIC,
    facts_of_sweep,
    open_run,
    open_trial,
    wandb_errors,
)
from lora_search.results.confirmation_text import verdicts
from lora_search.results.importance import importances
from lora_search.results.ranking import ranked, searched_keys
from lora_search.results.record import StudyRecord
from lora_search.results.verdict import metric_name, state_of
from lora_search.settings.overlay import trial_seed, trial_settings
from lora_search.settings.schema import SweepConfig
from lora_search.settings.secrets import redact
from lora_search.study.provenance import PEAK
from lora_search.trial import TrialRow, TrialRun

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
MOST_TAGGED = 20  # of the trials tied with the best; the leaderboard says it of all
REPEAT_HEADS = ("trial", "seed", "perplexity", "rung", "train_tokens", "train_seconds")
DUEL_HEADS = ("leader", "other", "change_percent", "standard_error", "is_sure", "seeds", "rows")
NOTES = """\
Report: {report}
Dashboard: optuna-dashboard {storage}
Again: {command}"""


def track_study(config: SweepConfig, record: StudyRecord) -> None:
    """Write the base's and the study's run, tag the best trials. Nothing if tracking is off or the study is
    not finished."""
    if record.is_final:
        _write((track_base, track_summary, tag_best), config, record)


def track_confirmation(config: SweepConfig, record: StudyRecord) -> None:
    """Write the confirmation's run, unless tracking is off."""
    _write((track_repeats,), config, record)


Part = Callable[[SweepConfig, StudyRecord], None]


def _write(parts: Sequence[Part], config: SweepConfig, record: StudyRecord) -> None:
    if config.tracker.name == "none":
        return
    try:
        import wandb
    except ImportError:
        return
    try:
        for part in parts:
            part(config, record)
        wandb.teardown()
    except wandb_errors() as error:
        logger.warning("W&B: the study's own runs are missing: %s", first_line(error))


def track_base(config: SweepConfig, record: StudyRecord) -> None:
    """Draw the base model as a level line, as far as any trial has gone."""
    base, run = record.base, open_own(config, record, "base")
    run.define_metric(STEP_METRIC)
    run.define_metric("*", step_metric=STEP_METRIC)
    for examples in sorted({0, max((row.examples_seen for row in record.rows), default=0)}):
        run.log({STEP_METRIC: examples, PERPLEXITY: base, LOSS: math.log(base)}, step=examples)
    run.finish()


def track_summary(config: SweepConfig, record: StudyRecord) -> None:
    """Write the study's tables and figures, and where its files are."""
    import wandb

    run = open_own(config, record, "study")
    columns, cells = leaderboard_cells(record)
    tables: dict[str, Any] = {"leaderboard": wandb.Table(columns=columns, data=cells)}
    if mattered := importances(record.rows):
        shown = [[one.key, one.share, one.low, one.high, one.p_value] for one in mattered]
        names = ["setting", "share", "low", "high", "p_value"]
        tables["importance"] = wandb.Table(columns=names, data=shown)
    run.log(tables)
    run.summary.update(figures(record))
    if config.tracker.log_adapter and (record.folder / "best/adapter").is_dir():
        artifact = wandb.Artifact(f"{config.study.name}-best", type="adapter")
        artifact.add_dir(str(record.folder / "best/adapter"))
        run.log_artifact(artifact)
    run.finish()


def track_repeats(config: SweepConfig, record: StudyRecord) -> None:
    """Write each fresh seed's result, the comparisons, and the verdict in words."""
    import wandb

    found, run = record.confirmation, open_own(config, record, "confirm")
    cells = [[getattr(repeat, head) for head in REPEAT_HEADS] for repeat in found.repeats]
    duels = [
        [d.leader, d.other, 100 * d.change, 100 * d.change_error, d.is_sure, d.num_seeds, d.num_rows]
        for d in found.duels
    ]
    table = wandb.Table(columns=list(DUEL_HEADS), data=duels)
    run.log({"repeats": wandb.Table(columns=list(REPEAT_HEADS), data=cells), "comparisons": table})
    means = {f"mean_perplexity/trial_{one.trial}": one.mean for one in found.fresh() if one.perplexities}
    run.summary.update({"verdict": " ".join(verdicts(found, record.rows)), **means})
    run.finish()


def tag_best(config: SweepConfig, record: StudyRecord) -> None:
    """Tag the best trial's run, and those of the trials tied with it. They were closed before the best was
    known, so each is continued under its own id: `wandb sync` joins such parts in order of time."""
    best = record.best
    if best is None or best.state != "COMPLETE":
        return
    tied = record.certainty.tied(ranked(record.rows))[:MOST_TAGGED]
    for row, tag in [(best, "best"), *((row, "tied") for row in tied)]:
        run = continue_trial(config, row, record, tag)
        run.summary.update(result_of(row, record.base))
        run.finish()


def continue_trial(config: SweepConfig, row: TrialRow, record: StudyRecord, tag: str) -> "Run":
    """Return the run of an ended trial, opened once more with the tag; it keeps the config that it had."""
    run = TrialRun(
        number=row.number,
        seed=trial_seed(config, row.params, row.number),
        settings=trial_settings(config, row.params),
        folder=str(record.folder / "trials" / str(row.number)),
        study_id=record.attributes.get("study_id", ""),
    )
    return open_trial(config, run, facts_of_sweep(config) | tracked_facts(record.attributes), [tag])


def result_of(row: TrialRow, base: float) -> dict[str, object]:
    """Return the summary of an ended trial, whole: a later part replaces an earlier one's."""
    found: dict[str, object] = {
        "state": row.state,
        "reason": row.reason,
        "best_perplexity": row.perplexity,
        "best_rung": row.best_rung,
        "change_percent": 100 * ((row.perplexity or math.nan) / base - 1),
        PERPLEXITY: row.perplexity,
        LOSS: math.log(row.perplexity or math.nan),
        "train_tokens": row.train_tokens,
    }
    if row.metric is not None:
        found[row.metric.name] = row.metric.score
    return found


def open_own(config: SweepConfig, record: StudyRecord, kind: str) -> "Run":
    """Return a run of the study itself, in its folder."""
    attributes, folder = record.attributes, record.folder
    notes = NOTES.format(
        report=folder / "report.html",
        storage=redact(config.study.storage),
        command=attributes.get("command", ""),
    )
    facts = json.loads(attributes.get("settings", "{}")) | tracked_facts(attributes)
    study_id = attributes.get("study_id", "")
    return open_run(config, study_id, kind, str(folder), kind=kind, tags=[kind], facts=facts, notes=notes)


def tracked_facts(attributes: Mapping[str, str]) -> dict[str, str]:
    """Return the facts on code and data for every run: the commit, and the counts of the rows."""
    kept = {key: value for key, value in attributes.items() if key.startswith("data.")}
    return {"git_commit": attributes.get("git_commit", ""), **kept}


def leaderboard_cells(record: StudyRecord) -> tuple[list[str], list[list[object]]]:
    """Return heads and rows of the leaderboard, the base first, with unrounded numbers."""
    rows, base = record.rows, record.base
    keys, metric = searched_keys(rows), metric_name(rows)
    answers = next((row.metric.base for row in rows if row.metric is not None), None)
    scored: list[object] = [answers] if metric else []
    cells: list[list[object]] = [["base", "", base, 0.0, 0, 0, 0, 0.0, *scored, *("" for _ in keys)]]
    for row in ranked(rows):
        change = None if row.perplexity is None else 100 * (row.perplexity / base - 1)
        state = "best" if row is record.best else state_of(row, record.certainty)
        result = [str(row.number), state, row.perplexity, change, len(row.perplexities), row.best_rung]
        values = [str(row.params.get(key, "")) for key in keys]
        scored = [row.metric.score if row.metric else None] if metric else []
        cells.append([*result, row.train_tokens, row.train_seconds, *scored, *values])
    return [*HEADS, *([metric] if metric else []), *keys], cells


def figures(record: StudyRecord) -> dict[str, object]:
    """Return the results of the study."""
    rows, attributes, best, base, test = record.rows, record.attributes, record.best, record.base, record.test
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
    scored = [row.metric for row in rows if row.metric is not None]
    if scored:
        top = max(scored, key=lambda one: one.score)
        found |= {"metric": top.name, "metric_base": top.base, "metric_best": top.score}
        found["metric_rows"] = top.num_rows
    if PEAK in attributes:
        found[PEAK] = int(attributes[PEAK])
    return found
