"""`python -m lora_search.export study.name=NAME [trial=N] [merge=true] [to=DIR]`: a folder ready to serve.

The folder has the adapter with tokenizer and model card, or merged weights, which are checked after writing.
Only merge imports torch.
"""

import argparse
import shutil
import sys
from pathlib import Path

from lora_search.command_line import FoundStudy, chosen_trial, find_study, recorded, run, study_parser, take
from lora_search.errors import ConfigError, StudyError
from lora_search.files.atomic import explained_writing, write_file
from lora_search.output.model_card import model_card
from lora_search.output.terminal import Progress
from lora_search.results.certainty import certainty_of
from lora_search.study.identity import find_identity
from lora_search.study.results import read_test_score
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow

OWN = {"trial": "", "merge": "false", "to": ""}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def main() -> int:
    """Export what the command line names; return the exit code."""
    own = "Its own keys: trial=N (default: the best), merge=true, to=FOLDER."
    return run(
        export, study_parser("export", f"Write an adapter or merged weights, with a model card. {own}")
    )


def export(arguments: argparse.Namespace, progress: Progress) -> None:
    """Write the folder and report its path."""
    own = take(arguments, OWN)
    if own["merge"] not in ("true", "false"):
        raise ConfigError("merge", own["merge"], "must be true or false")
    found = find_study(arguments)
    view = StudyView(found.config)
    row = chosen_trial("trial", own["trial"], view.rows())
    place = source_folder(found, row)
    is_merged = own["merge"] == "true"
    name = f"trial-{row.number}-merged" if is_merged else f"trial-{row.number}"
    to = Path(own["to"]) if own["to"] else found.folder / "export" / name
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError("to", str(to), "must be a new or empty folder", "Remove it, or name another.")
    attributes = view.attributes()
    merged = merge_to(arguments, found, attributes, row, to, progress) if is_merged else None
    if merged is None:
        copy_adapter(place, found.folder / "tokenizer", to)
    to_base = certainty_of(view.rows(), found.folder).against_base.get(row.number)
    card = model_card(row, attributes, to_base, read_test_score(attributes), merged)
    write_file(to / "README.md", card.encode())
    progress.event(f"wrote {to}")


def source_folder(found: FoundStudy, row: TrialRow) -> Path:
    """Return the trial's adapter. Raises StudyError if it was trained on another machine."""
    adapter = found.folder / "trials" / str(row.number) / "adapter"
    if not adapter.is_dir():
        raise StudyError(f"trial {row.number}: {adapter} does not exist. Export it where it was trained.")
    return adapter


def copy_adapter(adapter: Path, tokenizer: Path, to: Path) -> None:
    """Copy adapter and tokenizer, if an older version wrote the latter."""
    with explained_writing(to):
        for folder in (tokenizer, adapter):
            if folder.is_dir():
                shutil.copytree(folder, to, dirs_exist_ok=True)


def merge_to(
    arguments: argparse.Namespace,
    found: FoundStudy,
    attributes: dict[str, str],
    row: TrialRow,
    to: Path,
    progress: Progress,
) -> tuple[float, str]:
    """Write the merged weights; return their perplexity in plain transformers, and their dtype."""
    config = recorded(arguments, found, attributes)
    from lora_search.service.plain import merge
    from lora_search.service.reopen import read_again

    if config.model.quantization is not None:
        progress.event("the adapter was trained on the 4-bit base; it is merged into the unquantized base")
    inputs, identity = read_again(config), find_identity(found.config)
    expected = row.perplexity if row.perplexity is not None else float("nan")
    to.parent.mkdir(parents=True, exist_ok=True)
    merged = merge(
        config, identity.commit if identity else None, source_folder(found, row), found.folder / "tokenizer",
        to, inputs.splits.validation, expected,
    )  # fmt: skip
    progress.event(
        f"merged weights in plain transformers, {merged.dtype}: validation perplexity "
        f"{merged.perplexity:.4f}; the study says {expected:.4f}"
    )
    return merged.perplexity, merged.dtype


if __name__ == "__main__":
    sys.exit(main())
