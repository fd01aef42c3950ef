"""`python -m lora_search.confirm study.name=NAME confirm.top=3 confirm.seeds=3`: is the winner luck?

Retrains the best trials with fresh seeds and compares them. Imports torch only to train.
"""

import argparse
import sys
from collections.abc import Sequence

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("confirm")

# isort: split

from lora_search.command_line import open_study, run, study_parser, take, whole_number
from lora_search.output.shared_files import bring_files
from lora_search.output.status_text import confirmed_table
from lora_search.output.terminal import Progress
from lora_search.output.tracking_study import track_confirmation
from lora_search.page.report import write_report
from lora_search.results.confirmation_text import verdicts
from lora_search.results.ranking import base_of, ranked
from lora_search.results.record import StudyRecord
from lora_search.settings.rules import require
from lora_search.study.folder import own_folder
from lora_search.trial import TrialRow

OWN = {"confirm.top": "", "confirm.seeds": "3"}
TOP = 3  # or as many as are complete
MOST_RUNS = 200  # their results are kept in one attribute of the study


def main() -> int:
    """Confirm the study that the command line names; return the exit code."""
    own = f"Its own keys: confirm.top={TOP} (how many of the best; fewer where fewer are complete), "
    own += "confirm.seeds=3 (fresh seeds for each)."
    return run(
        confirm, study_parser("confirm", f"Retrain the best trials with fresh seeds; compare them. {own}")
    )


def confirm(arguments: argparse.Namespace, progress: Progress) -> None:
    """Retrain, compare, show the results, and rewrite the report."""
    own = take(arguments, OWN)
    seeds, text = whole_number("confirm.seeds", own["confirm.seeds"]), own["confirm.top"]
    top = whole_number("confirm.top", text) if text else None
    study = open_study(arguments)
    view, config, rows, folder = study.view, study.config, study.record.rows, study.record.folder
    trials = best_trials(rows, top, seeds)
    base_of(study.record.attributes)
    own_folder(config.study, folder)
    bring_files(config, study.record, progress)

    listed = ", ".join(map(str, trials))
    progress.event(f"study {config.study.name}: trials {listed}, {seeds} fresh seeds each")

    from lora_search.service import retraining

    done = retraining.confirm(config, view, folder, trials, seeds, progress)
    progress.console.print(confirmed_table(done, rows))
    for sentence in verdicts(done, rows):
        progress.console.print(sentence, markup=False, soft_wrap=True)
    record = StudyRecord(rows, view.attributes(), folder)
    progress.event(f"wrote {write_report(record)}")
    track_confirmation(config, record)


def best_trials(rows: Sequence[TrialRow], asked: int | None, seeds: int) -> list[int]:
    """Return the best complete trials, TOP at most if no number is asked for. Raises ConfigError if there are
    too few."""
    require(
        seeds >= 2, "confirm.seeds", seeds, "must be at least 2", "One seed has no spread: give 2 or more"
    )
    complete = [row.number for row in ranked(rows) if row.state == "COMPLETE"]
    top = min(TOP, max(1, len(complete))) if asked is None else asked
    rule = "must be at most the number of complete trials"
    require(
        bool(complete), "confirm.top", top, f"{rule}, and no trial is complete yet", "Run the sweep first."
    )
    remedy = f"Give confirm.top={len(complete)}, or continue the sweep."
    require(top <= len(complete), "confirm.top", top, f"{rule}, {len(complete)}", remedy)
    runs = top * seeds
    require(runs <= MOST_RUNS, "confirm.top x confirm.seeds", runs, f"must be at most {MOST_RUNS}")
    return complete[:top]


if __name__ == "__main__":
    sys.exit(main())
