"""`lora-search COMMAND ...`: the same as `python -m lora_search.COMMAND ...`. Imports no command but the one
it runs, so that --help is there at once."""

import runpy
import sys
from collections.abc import Sequence

from lora_search import __version__

COMMANDS = {  # each is the module lora_search.NAME
    "sweep": "search hyperparameters: train, prune, resume, conclude",
    "plan": "forecast time, tokens, money and memory of a sweep: a probe of seconds, no study",
    "inspect": "look at rows, lengths and the loss mask, without training",
    "score": "score winner and base on the test split; a sweep does it once, at its end",
    "confirm": "retrain the best trials with fresh seeds: is the winner luck?",
    "export": "write an adapter, or merged weights, as a folder with a model card",
    "generate": "answer questions with base and trials, one by one or a whole file",
    "status": "show one study, or all of a storage: trials, best, workers, slots",
    "list": "list the studies of a storage",
    "delete": "delete a study, its folder and its W&B runs; asks first",
    "report": "write runs/<study>/report.html anew, also while the sweep runs",
}
USAGE = "usage: lora-search COMMAND ... (lora-search COMMAND --help shows what a command takes)"


def main() -> int:
    """Run the command that the command line names; return the exit code."""
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Run the command with its arguments; it leaves with its own exit code."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(help_page())  # noqa: T201 (no library is imported for this page)
        return 0
    if name == "--version":
        print(f"lora-search {__version__}")  # noqa: T201
        return 0
    if name not in COMMANDS:
        there_are = f"There are: {', '.join(COMMANDS)}."
        print(f"lora-search {name!r}: no such command. {there_are}", file=sys.stderr)  # noqa: T201
        return 2
    sys.argv[:] = [sys.argv[0], *arguments[1:]]
    runpy.run_module(f"lora_search.{name}", run_name="__main__", alter_sys=True)
    return 0


def help_page() -> str:
    """Return the commands, one a line."""
    lines = [f"  {name:<10}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join([USAGE, "", *lines])


if __name__ == "__main__":
    sys.exit(main())
