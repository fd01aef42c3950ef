"""`python -m lora_search.export study.name=NAME [trial=N] [merge=true] [to=DIR]`: a folder ready to serve.

The folder has the adapter with tokenizer and model card, or merged weights, which are checked after writing.
Only merge imports torch.
"""

import argparse
import math
import sys
from pathlib import Path

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("export")

# isort: split

from lora_search.command_line import chosen_trial, open_study, run, study_parser, take
from lora_search.files.atomic import write_file
from lora_search.output.model_card import model_card, serving_lines
from lora_search.output.shared_files import adapter_here, bring_files
from lora_search.output.terminal import Progress
from lora_search.service.export_folder import check_target, copy_adapter, is_true, merge_to

OWN = {"trial": "", "merge": "false", "to": ""}


def main() -> int:
    """Export what the command line names; return the exit code."""
    own = "Its own keys: trial=N (default: the best), merge=true, to=FOLDER."
    return run(
        export, study_parser("export", f"Write an adapter or merged weights, with a model card. {own}")
    )


def export(arguments: argparse.Namespace, progress: Progress) -> None:
    """Write the folder and report its path."""
    own = take(arguments, OWN)
    is_merged = is_true("merge", own["merge"])
    study = open_study(arguments)
    config, record = study.config, study.record
    row, tokenizer = chosen_trial("trial", own["trial"], record), record.folder / "tokenizer"
    name = f"trial-{row.number}-merged" if is_merged else f"trial-{row.number}"
    to = Path(own["to"]) if own["to"] else record.folder / "export" / name
    check_target(to)
    bring_files(config, record, progress, [row.number])
    adapter = adapter_here(record.folder, row.number)
    if not tokenizer.is_dir():
        progress.event(f"warning: {tokenizer} does not exist: {to} gets no tokenizer and no chat template")
    merged = None
    if is_merged:
        merged = merge_to(config, adapter, tokenizer, to, row.perplexity or math.nan, progress)
    else:
        copy_adapter(adapter, tokenizer, to)
    write_file(to / "README.md", model_card(row, record, merged).encode())
    progress.event(f"wrote {to}")
    lines = serving_lines(row, record.attributes, to, is_merged=is_merged)
    progress.show("\n".join(["Serve or share it (docs/serving.md):", *(f"  {line}" for line in lines)]))


if __name__ == "__main__":
    sys.exit(main())
