"""`python -m lora_search.report study.name=NAME`: write the report anew, also during the sweep.

Imports no torch.
"""

import argparse
import sys

from lora_search.command_line import find_study, run, study_parser
from lora_search.output.page import write_report
from lora_search.output.ranking import base_of
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
    path = found.folder / "report.html"
    write_report(rows, attributes, base_of(attributes), path)
    progress.event(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
