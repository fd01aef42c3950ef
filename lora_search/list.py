"""`python -m lora_search.list [study.storage=URL]`: one line per study. Imports no torch."""

import argparse
import sys

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("list")

# isort: split

from lora_search.command_line import find_study, run, study_parser
from lora_search.output.terminal import Progress
from lora_search.status import show_all


def main() -> int:
    """List the studies of the storage; return the exit code."""
    return run(list_studies, study_parser("list", "List the studies of study.storage."))


def list_studies(arguments: argparse.Namespace, progress: Progress) -> None:
    """Print one line per study."""
    show_all(find_study(arguments), progress)


if __name__ == "__main__":
    sys.exit(main())
