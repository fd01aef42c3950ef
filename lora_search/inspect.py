"""`python -m lora_search.inspect [-cn SWEEP] data.path=...`: show rows as a sweep would train on them.

Reads, splits and tokenizes with the code of a sweep, which reuses the stored tokens. Loads no weights.
"""

import argparse
import sys
from pathlib import Path

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("inspect")

# isort: split

from lora_search.command_line import run, study_parser
from lora_search.errors import ConfigError
from lora_search.inspection import coloured, cut_table, histogram, page, shown_row
from lora_search.output.terminal import Progress
from lora_search.settings.composition import compose


def main() -> int:
    """Show the rows that the command line names; return the exit code."""
    parser = study_parser("inspect", "Show rows, lengths and the loss mask, without training.", is_sweep=True)
    parser.add_argument("--rows", type=int, default=3, help="how many rows to show (default: %(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    return run(inspect, parser)


def inspect(arguments: argparse.Namespace, progress: Progress) -> None:
    """Report the source and lengths of the rows, and show the first ones."""
    config = compose(arguments.sweep, arguments.overrides, arguments.config_dir)

    from lora_search.data.rows import Pair
    from lora_search.data.store import knows_rows, lengths_before_cuts  # these import torch
    from lora_search.prepare import describe_rows, read_inputs
    from lora_search.reading.load import load_rows
    from lora_search.settings.train_schema import ALL_TOKENS

    loaded = load_rows(config.data, is_known=knows_rows, watch=progress.watch)
    splits = read_inputs(config, loaded, None, watch=progress.watch).splits
    lengths = lengths_before_cuts(splits.train).tolist()
    lines = [*loaded.notes, *describe_rows(config, splits)]
    pairs = list(zip(splits.pairs["train"][: arguments.rows], splits.train[: arguments.rows], strict=True))
    if config.train.loss_on == ALL_TOKENS:
        pairs = [(Pair("", pair.prompt + pair.completion), example) for pair, example in pairs]
    rows = [shown_row(pair, len(example.input_ids)) for pair, example in pairs]
    progress.events(lines)
    print_plain = progress.console.print
    print_plain("\nTokens in a training row", markup=False)
    for line in [*histogram(lengths), "", *cut_table(lengths)]:
        print_plain(line, markup=False, highlight=False, soft_wrap=True)
    for row in rows:
        print_plain(f"\n{row.num_tokens} tokens; the model learns the green text:", markup=False)
        print_plain(coloured(row), soft_wrap=True)
    if arguments.html is not None:
        _write(arguments.html, page(f"Rows of {config.data.name}", lines, lengths, rows))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("--html", str(path), f"cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
