"""`python -m lora_search.report study.name=NAME`: write the report anew, also during the sweep.

Imports no torch.
"""

import argparse
import sys

from lora_search.command_line import find_study, run, study_parser
from lora_search.errors import StudyError
from lora_search.output.page import write_report
from lora_search.output.terminal import Progress
from lora_search.study.folder import find_owned
from lora_search.study.study import SweepStudy


def main() -> int:
    """Write the report of the study that the command line names; return the exit code."""
    return run(report, study_parser("report", "Write runs/<study>/report.html anew, also while it runs."))


def report(arguments: argparse.Namespace, progress: Progress) -> None:
    """Write the report and say where it is."""
    found = find_study(arguments)
    rows, attributes = SweepStudy.read(found.config)
    find_owned(found.config, found.folder)
    if "base_perplexity" not in attributes:
        raise StudyError(f"study.name: {found.config.name!r} has measured nothing yet. Run the sweep first.")
    path = found.folder / "report.html"
    write_report(rows, attributes, float(attributes["base_perplexity"]), path)
    progress.event(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
