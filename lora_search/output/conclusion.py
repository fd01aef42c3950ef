"""The conclusion of a sweep: leaderboard, best adapter, report, next commands. No torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from filelock import BaseFileLock, FileLock

from lora_search.errors import LoraSearchError
from lora_search.files.atomic import explained_writing
from lora_search.output.best_folder import export_best
from lora_search.output.leaderboard import leaderboard
from lora_search.output.shared_files import shared_results
from lora_search.output.terminal import Progress, next_steps
from lora_search.page.report import write_report
from lora_search.results.certainty import certainty_of
from lora_search.results.costs import compared
from lora_search.results.ranking import FINISHED, base_of, best_of, is_final
from lora_search.results.verdict import line_of_test
from lora_search.settings.range_ends import edge_notes
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import parse_space
from lora_search.study.stored_results import read_test_score
from lora_search.trial import TrialRow


def conclude(
    rows: Sequence[TrialRow],
    attributes: Mapping[str, str],
    config: SweepConfig,
    progress: Progress,
    *,
    is_interrupted: bool = False,
) -> None:
    """Show the leaderboard, write report and best adapter, show the next commands. Raises WriteError."""
    folder = Path(config.runs_dir) / config.study.name
    with shared_results(config, attributes, rows, folder, progress):
        _conclude(rows, attributes, config, progress, folder, is_interrupted)


def _conclude(
    rows: Sequence[TrialRow],
    attributes: Mapping[str, str],
    config: SweepConfig,
    progress: Progress,
    folder: Path,
    is_interrupted: bool,
) -> None:
    base_perplexity = base_of(attributes)
    truth = compared(rows, attributes, folder)
    for name, text in truth.items():
        progress.event(f"{name}: {text}")
    if not is_final(rows, attributes):
        progress.event("not all is done: this is the leaderboard so far")
    board = leaderboard(rows, base_perplexity, certainty_of(rows, folder), progress.console.width)
    progress.show(board)
    test = read_test_score(attributes)
    if test is not None:
        progress.show(line_of_test(test, best_of(rows)))
    with explained_writing(folder), one_at_a_time(folder):
        best = export_best(rows, attributes, folder)
        write_report(rows, attributes, base_perplexity, folder / "report.html")
    if "exhausted" in attributes and sum(r.state in FINISHED for r in rows) < config.study.most_trials:
        progress.event(
            "the space is exhausted: every combination has been tried, so fewer trials than n_trials ran"
        )
    for note in edges_of_best(rows, config):
        progress.event(note)
    progress.show("Next:")
    found = f"{best}/adapter" if best else "not here: see the warning above" if best_of(rows) else "none yet"
    steps = next_steps(config, folder, found, go_on="the same command" if is_interrupted else None)
    progress.show(steps)


def edges_of_best(rows: Sequence[TrialRow], config: SweepConfig) -> list[str]:
    """Return notes on best values at the edge of the searched ranges."""
    best = best_of(rows)
    notes = [] if best is None else edge_notes(config, parse_space(config), best.params)
    return [f"{text}: {override}" for text, override in notes]


def conclude_so_far(
    find: Callable[[], tuple[list[TrialRow], dict[str, str]]], config: SweepConfig, progress: Progress
) -> None:
    """Conclude an interrupted sweep: anything that cannot be read or written is a message, not an error."""
    try:
        rows, attributes = find()
        if "base_perplexity" in attributes:
            conclude(rows, attributes, config, progress, is_interrupted=True)
    except LoraSearchError as error:
        progress.event(f"no answer so far: {error}")


def one_at_a_time(folder: Path) -> BaseFileLock:
    """Wait for other starts on the same study, which often finish at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock")
