"""`python -m lora_search.report -cn NAME [study.name=...]`: write the report anew, also during the sweep.

Imports no torch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_search.errors import LoraSearchError, StudyError
from lora_search.output.page import write_report
from lora_search.output.terminal import Progress
from lora_search.settings.composition import DEFAULT_SWEEP, compose_study
from lora_search.study.study import SweepStudy


def main() -> int:
    """Write the report of the study that the command line names; return the exit code."""
    progress = Progress()
    arguments = parse_arguments(sys.argv[1:])
    try:
        study, runs_dir = compose_study(arguments.sweep, arguments.overrides, arguments.config_dir)
        rows, attributes = SweepStudy.read(study)
        if "base_perplexity" not in attributes:
            raise StudyError(f"study.name: {study.name!r} has measured nothing yet. Run the sweep first.")
        path = Path(runs_dir) / study.name / "report.html"
        write_report(rows, attributes, float(attributes["base_perplexity"]), path)
    except LoraSearchError as error:
        progress.console.print(str(error), markup=False, soft_wrap=True)
        return error.exit_code
    progress.event(f"wrote {path}")
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return sweep, overrides and config_dir, named as in `python -m lora_search.sweep`."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_search.report",
        description="Write runs/<study>/report.html anew, also while the sweep runs.",
    )
    parser.add_argument("-cn", "--config-name", dest="sweep", default=DEFAULT_SWEEP, metavar="SWEEP",
                        help="the sweep, as in lora_search.sweep (default: %(default)s)")  # fmt: skip
    parser.add_argument("-cd", "--config-dir", type=Path, metavar="DIR", help="a folder of your own sweeps")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. study.name=mine")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
