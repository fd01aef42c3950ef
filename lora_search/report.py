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

from lora_search.command_line import open_study, run, study_parser
from lora_search.files.atomic import write_file
from lora_search.output.shared_files import bring_files
from lora_search.output.terminal import Progress
from lora_search.page.report import write_report
from lora_search.page.text_report import report_facts, report_markdown
from lora_search.study.folder import own_folder


def main() -> int:
    """Write the report of the study that the command line names; return the exit code."""
    parser = study_parser("report", "Rewrite runs/<study>/report.html, also during the sweep.")
    parser.add_argument("--format", choices=("html", "json", "md"), default="html",
                        help="json, md: report.json or .md, same content (default: %(default)s)")  # fmt: skip
    return run(report, parser)


def report(arguments: argparse.Namespace, progress: Progress) -> None:
    """Write the report and print its path."""
    study = open_study(arguments)
    own_folder(study.config.study, study.record.folder)
    bring_files(study.config, study.record, progress)
    path = study.record.folder / f"report.{arguments.format}"
    if arguments.format == "html":
        write_report(study.record)
    elif arguments.format == "json":
        write_file(path, json.dumps(report_facts(study.record), indent=2, allow_nan=False).encode())
    else:
        write_file(path, report_markdown(study.record).encode())
    progress.event(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
