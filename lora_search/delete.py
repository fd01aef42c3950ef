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

from lora_search.command_line import find_study, recorded, run, study_parser
from lora_search.errors import ConfigError, InputError, StudyError
from lora_search.files.atomic import explained_writing
from lora_search.output.dashboard_note import remove_files
from lora_search.output.shared_files import copies_of
from lora_search.output.terminal import Progress
from lora_search.study.folder import find_owned
from lora_search.study.view import StudyView, delete_study


def main() -> int:
    """Delete the study that the command line names; return the exit code."""
    parser = study_parser("delete", "Delete a study (study.name=NAME), its folder and the W&B runs in it.")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return run(delete, parser)


def delete(arguments: argparse.Namespace, progress: Progress) -> None:
    """Ask, then delete copies, study and folder: what may fail first, so that the command can be repeated."""
    if not any(text.startswith("study.name=") for text in arguments.overrides):
        raise InputError("study.name: must be given to delete a study. Add study.name=NAME.")
    found = find_study(arguments)
    view = StudyView(found.config)
    find_owned(found.config, found.folder)
    alive = sum(not is_dead for is_dead in view.workers().values())
    if alive:
        raise StudyError(f"study.name: {found.config.name!r} has {alive} running workers. Stop them first.")
    num_trials = len(view.rows())
    what = f"study {found.config.name!r} with {num_trials} trials and the folder {found.folder}"
    if not arguments.yes and not agrees(found.config.name, what, progress):
        raise ConfigError("study.name", found.config.name, "was not confirmed, so nothing is deleted")
    attributes = view.attributes()
    copies = copies_of(recorded(arguments, found, attributes), attributes)
    if copies is not None:
        copies.delete()
    delete_study(found.config)
    with explained_writing(found.folder):
        remove_files(found.runs_dir, attributes.get("study_id", found.config.name))
        if found.folder.is_dir():
            shutil.rmtree(found.folder)
    progress.event(f"deleted {what}")


def agrees(name: str, what: str, progress: Progress) -> bool:
    """Ask for the study's name; no answer means no."""
    progress.console.print(f"This deletes {what} permanently.", markup=False, soft_wrap=True)
    progress.console.print("Type the study's name to confirm: ", end="", markup=False)
    sys.stdout.flush()
    return sys.stdin.readline().strip() == name


if __name__ == "__main__":
    sys.exit(main())
