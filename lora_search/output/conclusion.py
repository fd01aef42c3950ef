"""The conclusion of a sweep: leaderboard, best adapter, report, next commands. No torch."""

from collections.abc import Callable
from pathlib import Path

from lora_search.errors import LoraSearchError
from lora_search.files.atomic import explained_writing
from lora_search.files.lock import alone
from lora_search.output.best_folder import export_best
from lora_search.output.leaderboard import leaderboard
from lora_search.output.shared_files import shared_results
from lora_search.output.terminal import Progress, next_steps
from lora_search.page.report import write_report
from lora_search.results.costs import compared
from lora_search.results.ranking import FINISHED
from lora_search.results.record import StudyRecord
from lora_search.results.verdict import line_of_test
from lora_search.settings.range_ends import edge_notes
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import parse_space
from lora_search.trial import TrialRow


def conclude(
    record: StudyRecord, config: SweepConfig, progress: Progress, *, is_interrupted: bool = False
) -> None:
    """Show the leaderboard, write report and best adapter, show the next commands. Raises WriteError."""
    with shared_results(config, record, progress):
        _conclude(record, config, progress, is_interrupted)


def _conclude(record: StudyRecord, config: SweepConfig, progress: Progress, is_interrupted: bool) -> None:
    rows, folder = record.rows, record.folder
    for name, text in compared(record).items():
        progress.event(f"{name}: {text}")
    if not record.is_final:
        progress.event("not all is done: this is the leaderboard so far")
    progress.show(leaderboard(record, progress.console.width))
    if record.test is not None:
        progress.show(line_of_test(record.test, record.best))
    with explained_writing(folder), alone(folder):  # other starts on the study often finish at the same time
        best = export_best(record)
        write_report(record)
    if "exhausted" in record.attributes and sum(r.state in FINISHED for r in rows) < config.study.most_trials:
        progress.event(
            "the space is exhausted: every combination has been tried, so fewer trials than n_trials ran"
        )
    notes = edge_notes(config, parse_space(config), record.best.params) if record.best else []
    for text, override in notes:
        progress.event(f"{text}: {override}")
    progress.show("Next:")
    found = f"{best}/adapter" if best else "not here: see the warning above" if record.best else "none yet"
    steps = next_steps(config, folder, found, go_on="the same command" if is_interrupted else None)
    progress.show(steps)


def conclude_so_far(
    find: Callable[[], tuple[list[TrialRow], dict[str, str]]], config: SweepConfig, progress: Progress
) -> None:
    """Conclude an interrupted sweep: anything that cannot be read or written is a message, not an error."""
    try:
        record = StudyRecord(*find(), Path(config.runs_dir) / config.study.name)
        if "base_perplexity" in record.attributes:
            conclude(record, config, progress, is_interrupted=True)
    except LoraSearchError as error:
        progress.event(f"no answer so far: {error}")
