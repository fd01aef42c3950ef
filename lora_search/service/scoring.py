"""Scores winner and base on the test split, once, at the end of a sweep.

A second look would turn it into a second validation split: it needs --again and is counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lora_search.engine.engine import Engine
from lora_search.files.row_scores import TEST, write_scores
from lora_search.output.terminal import Progress
from lora_search.results.certainty import compare
from lora_search.settings.schema import SweepConfig
from lora_search.study.stored_results import TestScore, has_test_score, store_test_score
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow


@dataclass(frozen=True)
class Finished:
    """A finished study on its loaded base. ``after_pass`` is called after every pass, and may raise."""

    engine: Engine
    config: SweepConfig
    folder: Path
    progress: Progress
    after_pass: Callable[[], None] = lambda: None


def score_test_once(study: Finished, best: TrialRow | None) -> TestScore | None:
    """Score the best trial and the base on the test split, unless any worker has done so before.

    Returns None if there is nothing to score: no test rows, no complete trial, its adapter elsewhere.
    """
    engine, folder, config = study.engine, study.folder, study.config.study
    if best is None or not engine.splits.test or not adapter_of(best, folder).is_dir():
        return None
    if has_test_score(config):
        return None
    engine.after_pass = study.after_pass
    return score_test(engine, StudyView(config), best, folder, before=None)


def score_test(
    engine: Engine, view: StudyView, best: TrialRow, folder: Path, before: TestScore | None
) -> TestScore | None:
    """Score the trial and the base on the test split, and store the result in the study: one look more than
    ``before``.

    Returns None if a score is not finite, if there is only one row, or if another worker was faster.
    """
    slot = engine.place(view.settings_of(best.number), adapter_of(best, folder))
    base, scores = engine.scores([None, slot], engine.splits.test)
    engine.bank.release(slot)
    write_scores(folder / "trials" / str(best.number), scores, best.best_rung or 0, TEST)
    comparison = compare(scores, base)
    if comparison is None:
        return None
    earlier = (*before.earlier, (before.trial, before.perplexity, before.scored_at)) if before else ()
    score = TestScore(
        trial=best.number,
        rung=best.best_rung or 0,
        perplexity=scores.perplexity,
        base_perplexity=base.perplexity,
        difference=comparison.difference,
        error=comparison.error,
        num_rows=comparison.num_rows,
        scored_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        looks=before.looks + 1 if before else 1,
        earlier=earlier,
    )
    return score if store_test_score(view.config, score) else None


def adapter_of(row: TrialRow, folder: Path) -> Path:
    """Return the folder of a trial's adapter, which exists if it was trained here."""
    return folder / "trials" / str(row.number) / "adapter"
