"""`python -m lora_search.delete study.name=NAME [--yes]`: delete the study, its folder and its W&B runs.

Asks first. Imports no torch.
"""

import argparse
import shutil
import sys

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("delete")

# isort: split

from lora_search.command_line import open_study, run, study_parser
from lora_search.errors import ConfigError, InputError, StudyError
from lora_search.files.atomic import explained_writing
from lora_search.output.dashboard_note import remove_files
from lora_search.output.shared_files import copies_of
from lora_search.output.terminal import Progress
from lora_search.study.folder import find_owned
from lora_search.study.view import delete_study


def main() -> int:
    """Delete the study that the command line names; return the exit code."""
    parser = study_parser("delete", "Delete a study (study.name=NAME), its folder and the W&B runs in it.")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return run(delete, parser)


def delete(arguments: argparse.Namespace, progress: Progress) -> None:
    """Ask, then delete copies, study and folder: what may fail first, so that the command can be repeated."""
    if not any(text.startswith("study.name=") for text in arguments.overrides):
        raise InputError("study.name: must be given to delete a study. Add study.name=NAME.")
    study = open_study(arguments)
    attributes, folder, name = study.record.attributes, study.record.folder, study.view.config.name
    find_owned(study.view.config, folder)
    alive = sum(not is_dead for is_dead in study.view.workers().values())
    if alive:
        raise StudyError(f"study.name: {name!r} has {alive} running workers. Stop them first.")
    what = f"study {name!r} with {len(study.record.rows)} trials and the folder {folder}"
    if not arguments.yes and not agrees(name, what, progress):
        raise ConfigError("study.name", name, "was not confirmed, so nothing is deleted")
    if (copies := copies_of(study.config, attributes)) is not None:
        copies.delete()
    delete_study(study.view.config)
    with explained_writing(folder):
        remove_files(folder.parent, attributes.get("study_id", name))
        if folder.is_dir():
            shutil.rmtree(folder)
    progress.event(f"deleted {what}")


def agrees(name: str, what: str, progress: Progress) -> bool:
    """Ask for the study's name; no answer means no."""
    progress.console.print(f"This deletes {what} permanently.", markup=False, soft_wrap=True)
    progress.console.print("Type the study's name to confirm: ", end="", markup=False)
    sys.stdout.flush()
    return sys.stdin.readline().strip() == name


if __name__ == "__main__":
    sys.exit(main())
