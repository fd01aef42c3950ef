"""`python -m lora_search.status [study.name=NAME]`: one study, or all of study.storage. Imports no torch."""

import argparse
import sys
from dataclasses import replace

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("status")

# isort: split

from lora_search.command_line import FoundStudy, find_study, run, study_parser
from lora_search.output.status_text import studies_table, study_page
from lora_search.output.terminal import Progress
from lora_search.study.view import StudyView, study_names


def main() -> int:
    """Show the study that the command line names, or all; return the exit code."""
    return run(status, study_parser("status", "Show one study (study.name=NAME), or all of study.storage."))


def status(arguments: argparse.Namespace, progress: Progress) -> None:
    """Print the state of the study."""
    found = find_study(arguments)
    if not any(text.startswith("study.name=") for text in arguments.overrides):
        show_all(found, progress)
        return
    width = progress.console.width
    progress.console.print(study_page(StudyView(found.config), found.folder, width))


def show_all(found: FoundStudy, progress: Progress) -> None:
    """Print one line per study of the storage."""
    names = study_names(found.config)
    progress.console.print(studies_table([StudyView(replace(found.config, name=name)) for name in names]))


if __name__ == "__main__":
    sys.exit(main())
