"""`python -m lora_search.report study.name=NAME`: rewrite the report, also during the sweep.

Imports no torch.
"""

import argparse
import json
import sys

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("report")

# isort: split

from lora_search.command_line import find_study, recorded, run, study_parser
from lora_search.files.atomic import write_file
from lora_search.output.shared_files import bring_files
from lora_search.output.terminal import Progress
from lora_search.page.report import write_report
from lora_search.page.text_report import report_facts, report_markdown
from lora_search.results.ranking import base_of
from lora_search.study.folder import own_folder
from lora_search.study.study import SweepStudy


def main() -> int:
    """Write the report of the study that the command line names; return the exit code."""
    parser = study_parser("report", "Rewrite runs/<study>/report.html, also during the sweep.")
    parser.add_argument("--format", choices=("html", "json", "md"), default="html",
                        help="json, md: report.json or .md, same content (default: %(default)s)")  # fmt: skip
    return run(report, parser)


def report(arguments: argparse.Namespace, progress: Progress) -> None:
    """Write the report and print its path."""
    found = find_study(arguments)
    rows, attributes = SweepStudy.read(found.config)
    own_folder(found.config, found.folder)
    bring_files(recorded(arguments, found, attributes), attributes, rows, found.folder, progress)
    path, base = found.folder / f"report.{arguments.format}", base_of(attributes)
    if arguments.format == "html":
        write_report(rows, attributes, base, path)
    elif arguments.format == "json":
        known = report_facts(rows, attributes, base, found.folder)
        write_file(path, json.dumps(known, indent=2, allow_nan=False).encode())
    else:
        write_file(path, report_markdown(rows, attributes, base, found.folder).encode())
    progress.event(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
