"""The output of `status` and `list`: one line per study, and one study in full."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_search.output.leaderboard import leaderboard
from lora_search.output.slot_table import plain_table, slot_table
from lora_search.results.confirmation import Confirmation
from lora_search.results.confirmation_text import HEADS, confirmed_cells, verdicts
from lora_search.results.formatting import show_change, show_perplexity, show_seconds
from lora_search.results.ranking import FINISHED, best_of, searched_keys
from lora_search.results.record import StudyRecord
from lora_search.results.verdict import line_of_final, line_of_test
from lora_search.settings.recorded import recorded_values
from lora_search.study.stored_results import read_finals
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow

STATES = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")


def studies_table(views: Sequence[StudyView]) -> Table:
    """Return a line per study: how many trials are in which state, and the best against the base."""
    table = plain_table()
    table.add_column("study", no_wrap=True)
    for name in ("trials", "complete", "pruned", "failed", "running", "best", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for view in views:
        rows, attributes = view.rows(), view.attributes()
        best, base = best_of(rows), float(attributes.get("base_perplexity", "nan"))
        states = [row.state for row in rows]
        counts = [str(states.count(state)) for state in STATES[:4]]
        change = show_change(base, best.perplexity) if best else "-"
        shown = show_perplexity(best.perplexity if best else None)
        finished = sum(state in FINISHED for state in states)
        of_all = f"{finished}/{recorded_values(attributes).get('study.n_trials', '?')}"
        table.add_row(Text(view.config.name), of_all, *counts, shown, change)
    return table


def confirmed_table(confirmation: Confirmation, rows: Sequence[TrialRow]) -> Table:
    """Return the results of each trial's fresh seeds, the best mean first."""
    table = plain_table("Confirmation")
    for name in HEADS:
        table.add_column(name, justify="right")
    for cells in confirmed_cells(confirmation, rows):
        table.add_row(*cells)
    return table


def seconds_left(rows: Sequence[TrialRow], attributes: Mapping[str, str]) -> float | None:
    """Return the time left at the pace of all time so far, where as many trials are pruned as until now. None
    before the first trial has ended, or where a budget alone ends the sweep."""
    settings = recorded_values(attributes)
    wanted, hours = settings.get("study.n_trials"), float(attributes.get("hours over all starts", 0))
    ended = [row for row in rows if row.state in ("COMPLETE", "PRUNED")]
    done = sum(len(row.perplexities) for row in rows)
    if not isinstance(wanted, int) or not ended or not done or not hours:
        return None
    usual = sum(len(row.perplexities) for row in ended) / len(ended)
    begun = [len(row.perplexities) for row in rows if row.state == "RUNNING"]
    not_begun = max(0, wanted - len(ended) - len(begun))
    rungs = usual * not_begun + sum(max(1.0, usual - count) for count in begun)
    return rungs * hours * 3600 / done


def study_page(view: StudyView, folder: Path, width: int) -> RenderableType:
    """Return one study: its line, running trials, leaderboard and test score."""
    rows, attributes = view.rows(), view.attributes()
    record, slots, workers = StudyRecord(rows, attributes, folder), view.slots(), view.workers()
    parts: list[RenderableType] = [studies_table([view]), ""]
    if workers:
        alive = sum(not is_dead for is_dead in workers.values())
        left = seconds_left(rows, attributes) if alive else None
        then = f", about {show_seconds(left)} left" if left is not None else ""
        parts.append(f"{alive} of {len(workers)} workers alive, {len(slots)} slots busy{then}")
        parts += [slot_table(slots, searched_keys(rows), width), ""]
    if "base_perplexity" in attributes:
        parts.append(leaderboard(record, width))
    if record.test is not None:
        parts.append(Text(line_of_test(record.test, record.best)))
    parts += [Text(line_of_final(final)) for final in read_finals(attributes)]
    if record.confirmation.repeats:
        sentences = [Text(sentence) for sentence in verdicts(record.confirmation, rows)]
        parts += ["", confirmed_table(record.confirmation, rows), *sentences]
    report = folder / "report.html"
    if os.path.exists(report):
        parts.append(Text(f"report: {report}", style="dim"))
    return Group(*parts)
