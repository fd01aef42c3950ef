"""runs/<study>/: where a sweep writes."""

from pathlib import Path

from lora_search.errors import ConfigError
from lora_search.files.atomic import explained_writing
from lora_search.settings.schema import SweepConfig


def study_folder(config: SweepConfig) -> Path:
    """Return where the sweep writes, made where it is missing. Raises ConfigError where that is not inside
    runs_dir."""
    runs = Path(config.runs_dir)
    folder = runs / config.study.name
    rule, remedy = f"must be a folder inside {runs}", "Choose another study.name."
    if folder.resolve().parent != runs.resolve() or (folder.exists() and not folder.is_dir()):
        leads = f"{rule}, and {folder} leads to {folder.resolve()}"
        raise ConfigError("study.name", config.study.name, leads, remedy)
    with explained_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
