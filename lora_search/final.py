"""`python -m lora_search.final study.name=NAME [rows=all] [seeds=K] [merge=true] [to=DIR]`: for use.

Trains the winner's settings on training and validation rows, with rows=all on the test rows too, and exports
the adapter. Imports torch once it is going to train.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("final")

# isort: split

from lora_search.command_line import chosen_trial, open_study, run, study_parser, take, whole_number
from lora_search.errors import ConfigError
from lora_search.files.atomic import write_file
from lora_search.output.model_card import model_card
from lora_search.output.shared_files import bring_files
from lora_search.output.terminal import Progress
from lora_search.page.report import write_report
from lora_search.results.ranking import base_of
from lora_search.results.record import StudyRecord
from lora_search.results.verdict import line_of_final
from lora_search.service.export_folder import check_target, copy_adapter, is_true, merge_to
from lora_search.study.folder import own_folder
from lora_search.study.stored_results import FinalAdapter, add_final, read_finals

OWN = {"rows": "train+validation", "seeds": "1", "trial": "", "merge": "false", "to": ""}
SPLITS = {"train+validation": ("train", "validation"), "all": ("train", "validation", "test")}
MOST_SEEDS = 50


def main() -> int:
    """Train and export what the command line names; return the exit code."""
    does = "Train the winner's settings on training and validation rows and export the adapter, for use."
    own = (
        "Its own keys: rows=train+validation (default) or all (the test rows too), seeds=1, trial=N "
        "(default: the best), merge=true, to=FOLDER."
    )
    return run(final, study_parser("final", f"{does} {own}"))


def final(arguments: argparse.Namespace, progress: Progress) -> None:
    """Train, export each seed's adapter, and note that in the study."""
    own = take(arguments, OWN)
    is_merged, seeds = is_true("merge", own["merge"]), whole_number("seeds", own["seeds"])
    if own["rows"] not in SPLITS:
        raise ConfigError("rows", own["rows"], f"must be one of {', '.join(SPLITS)}")
    if seeds > MOST_SEEDS:
        raise ConfigError("seeds", seeds, f"must be at most {MOST_SEEDS}")
    study = open_study(arguments)
    config, record, view = study.config, study.record, study.view
    row = chosen_trial("trial", own["trial"], record)
    name = f"final-trial-{row.number}" + ("-all" if own["rows"] == "all" else "")
    to = (
        Path(own["to"]) if own["to"] else record.folder / "export" / (name + ("-merged" if is_merged else ""))
    )
    check_target(to)
    base_of(record.attributes)
    own_folder(config.study, record.folder)
    bring_files(config, record, progress)
    progress.event(
        f"study {config.study.name}: the settings of trial {row.number}, up to rung {row.best_rung}"
    )

    from lora_search.service import final as training

    settings = view.settings_of(row.number)
    trained = training.train_final(config, row, settings, record.folder, SPLITS[own["rows"]], seeds, progress)
    for one in trained:
        place = to if seeds == 1 else to / f"seed-{one.seed}"
        tokenizer, merged = record.folder / "tokenizer", None
        if is_merged:
            merged = merge_to(config, one.adapter, tokenizer, place, one.perplexity, progress)
        else:
            copy_adapter(one.adapter, tokenizer, place)
        made = FinalAdapter(
            trial=row.number,
            rung=row.best_rung or 0,
            splits=SPLITS[own["rows"]],
            num_rows=one.num_rows,
            epochs=(row.best_rung or 0) / settings.evals_per_epoch,
            seed=one.seed,
            folder=str(place),
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_file(place / "README.md", model_card(row, record, merged, made).encode())
        add_final(config.study, read_finals(view.attributes()), made)
        training.forget(one)
        progress.event(line_of_final(made))
    written = write_report(StudyRecord(view.rows(), view.attributes(), record.folder))
    progress.event(f"wrote {written}")


if __name__ == "__main__":
    sys.exit(main())
