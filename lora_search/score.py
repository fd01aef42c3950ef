"""`python -m lora_search.score study.name=NAME [--again]`: score winner and base on the test split.

A sweep does this by itself when it ends. Imports torch only to compute.
"""

import argparse
import sys

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("score")

# isort: split

from lora_search.command_line import open_study, run, study_parser
from lora_search.errors import InputError, StudyError
from lora_search.output.shared_files import adapter_here, bring_files
from lora_search.output.terminal import Progress
from lora_search.results.verdict import line_of_test


def main() -> int:
    """Score the best trial of the study that the command line names; return the exit code."""
    parser = study_parser("score", "Score the best trial and the base on the test split.")
    parser.add_argument("--again", action="store_true", help="score once more; the report counts it")
    return run(score, parser)


def score(arguments: argparse.Namespace, progress: Progress) -> None:
    """Score and print the result."""
    study = open_study(arguments)
    config, record, view = study.config, study.record, study.view
    best, before, name = record.best, record.test, config.study.name
    if best is None:
        raise StudyError(f"study.name: {name!r} has no complete trial yet. Run the sweep first.")
    if before is not None and not arguments.again:
        raise InputError(
            f"score: {name} was scored at {before.scored_at} ({line_of_test(before)}). A second "
            "look makes the test split a second validation split. Add --again to score anyway, counted."
        )
    bring_files(config, record, progress, [best.number])
    adapter_here(record.folder, best.number)

    from lora_search.service.reopen import reopen
    from lora_search.service.scoring import score_test

    engine = reopen(config, [view.settings_of(best.number)], num_slots=1)
    num_rows = len(engine.splits.test)
    found_score = score_test(engine, view, best, record.folder, before) if num_rows else None
    if found_score is None:
        raise StudyError(
            f"data.test_fraction: {num_rows} test rows give no score, or another command has "
            "scored them meanwhile. `lora-search status` shows the score."
        )
    progress.event(line_of_test(found_score))


if __name__ == "__main__":
    sys.exit(main())
