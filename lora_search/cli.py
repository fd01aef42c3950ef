"""`lora-search COMMAND ...` is the same as `python -m lora_search.COMMAND ...`. Imports only the command that
it runs, so that --help is instant."""

import runpy
import sys
from collections.abc import Sequence

from lora_search import __version__

COMMANDS = {  # name of the module in lora_search -> purpose
    "sweep": "search hyperparameters: train, prune, resume, conclude",
    "plan": "forecast time, tokens, cost and memory of a sweep, from a probe of seconds, without a study",
    "inspect": "show rows, lengths and the loss mask, without training",
    "score": "score winner and base on the test split; a sweep does so once, at its end",
    "confirm": "retrain the best trials with fresh seeds: is the winner luck?",
    "export": "write an adapter, or merged weights, as a folder with a model card",
    "final": "train the winner's settings on training and validation rows, for use; the result has no score",
    "generate": "answer questions with base and trials, one by one or a whole file",
    "status": "show one study, or all of a storage: trials, best, workers, slots",
    "list": "list the studies of a storage",
    "delete": "delete a study, its folder and its W&B runs; asks first",
    "report": "rewrite runs/<study>/report.html, also during the sweep",
}
USAGE = "usage: lora-search COMMAND ... (lora-search COMMAND --help shows its arguments)"


def main() -> int:
    """Run the command that the command line names; return the exit code."""
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Run the command with its arguments; it exits with its own code."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(help_page())  # noqa: T201 (this page imports no library)
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
    """Return the commands, one per line."""
    lines = [f"  {name:<10}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join([USAGE, "", *lines])


if __name__ == "__main__":
    sys.exit(main())
