"""What can be refused before a model is loaded, and what people should know of a search before it begins.

Folders and the database first; once the data is read, steps and rungs that it cannot fill.
"""

import tempfile
from pathlib import Path

from lora_search.data.preparation import LENGTH, Splits
from lora_search.database.storage import check_storage
from lora_search.errors import ConfigError
from lora_search.settings.schema import SweepConfig, require
from lora_search.settings.space import Space, largest


def check_places(config: SweepConfig) -> None:
    """Make the study's folder. Raises where it cannot be written to, or the database cannot be used."""
    folder = Path(config.runs_dir) / config.study.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        rule = f"must be a folder that can be written to ({folder}: {error.strerror})"
        raise ConfigError("runs_dir", config.runs_dir, rule, "Give another folder.") from None
    check_storage(config.study)


def check_amount(config: SweepConfig, space: Space, num_train: int) -> None:
    """Raise ConfigError where one optimizer step would take more examples than there are: its learning rate
    would still be warming up when the trial ends."""
    batch_size = largest(config, space, "train.batch_size")
    steps = largest(config, space, "train.gradient_accumulation_steps")
    key = "train.batch_size" if steps == 1 else "train.batch_size * train.gradient_accumulation_steps"
    rule = f"must be at most the number of training examples, {num_train}"
    require(batch_size * steps <= num_train, key, batch_size * steps, rule, "Lower it, or give more data.")
    rungs = config.train.evals_per_epoch
    require(rungs <= num_train, "train.evals_per_epoch", rungs, rule)


def describe_search(config: SweepConfig, space: Space) -> list[str]:
    """Return what is searched, and where a value given beside it is not tried: one line each."""
    if not space.expressions:
        return ["searching nothing: one trial with the settings as they are"]
    lines = [f"searching {', '.join(f'{key} {text}' for key, text in space.expressions.items())}"]
    outside = space.outside(config)
    if outside and config.study.first_trial_is_default:
        given = ", ".join(f"{key}={value}" for key, value in outside.items())
        lines.append(f"{given} lies outside what is searched: the first trial is drawn like the others")
    return lines


def describe_rows(config: SweepConfig, splits: Splits) -> list[str]:
    """Return what was read and left out, and how long the rows are: one line each."""
    is_length = {key: key.startswith(LENGTH) for key in splits.counts}
    rows = ", ".join(f"{count} {key}" for key, count in splits.counts.items() if not is_length[key])
    lengths = [f"{key.removeprefix(LENGTH)} {n}" for key, n in splits.counts.items() if is_length[key]]
    chosen = f"rows are cut at {splits.max_length} tokens (data.max_length={config.data.max_length})"
    return [f"data {config.data.path}: {rows}", f"{chosen}; before that:{','.join(lengths)}"]
