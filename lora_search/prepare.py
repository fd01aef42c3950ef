"""From settings to an engine and a study that are ready to search, and what is refused on the way.

Folders and the database first, then rows, then what the rows cannot fill; the model last. Imports torch, so
`sweep` imports it only when it is going to train.
"""

import sys
import tempfile
from pathlib import Path

from lora_search.data.preparation import prepare, write_pairs
from lora_search.data.reading import load_rows
from lora_search.data.rows import Splits
from lora_search.data.tokens import LENGTH
from lora_search.database.storage import check_storage
from lora_search.engine.build import Room, build_engine
from lora_search.engine.engine import Engine
from lora_search.errors import ConfigError
from lora_search.files.atomic import explained_writing
from lora_search.files.row_scores import BASE, write_scores
from lora_search.model.loading import load_base, load_tokenizer, resolve_model
from lora_search.ops.device import pick_device
from lora_search.output.dashboard_note import write_note
from lora_search.output.terminal import Progress
from lora_search.settings.schema import SweepConfig, require
from lora_search.settings.space import Space, largest
from lora_search.study.about import attributes, fingerprint
from lora_search.study.folder import study_folder
from lora_search.study.study import SweepStudy
from lora_search.worker.command import typed_command


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


def measure_base(engine: Engine, folder: Path) -> str:
    """Return the bare base's validation perplexity; keep how it predicts each row."""
    scores = engine.evaluate_base()
    write_scores(folder, scores, 0, BASE)
    return repr(scores.perplexity)


def prepare_sweep(
    config: SweepConfig, sweep_name: str, space: Space, progress: Progress
) -> tuple[Engine, SweepStudy]:
    """Return engine and study, ready to search: data read and split, base loaded and measured."""
    pick_device(config.engine.device)
    rows = load_rows(config.data)
    check_places(config)
    progress.event(f"base model {config.model.path}: reading")
    source = resolve_model(config.model)
    splits = prepare(config, rows, load_tokenizer(source, config.model))
    for line in describe_rows(config, splits):
        progress.event(line)
    check_amount(config, space, len(splits.train))
    base = load_base(source, config.model, config.engine)
    engine, sizes = build_engine(config, Room.of_space(config, space), base, splits)
    if sizes:
        progress.event(f"engine: {sizes}")
    folder, known = (
        study_folder(config),
        attributes(config, sweep_name, typed_command(sys.argv), source, splits),
    )
    print_of_it = fingerprint(config, splits, str(base.dtype).removeprefix("torch."))
    study = SweepStudy.open(config, space, print_of_it, known, folder)
    with explained_writing(folder):
        write_pairs(splits, folder / "data")  # now that no other sweep's lie there
    for change in study.widened:
        progress.event(f"study {config.study.name}: widened {change}")
    progress.event(f"study {config.study.name}: {study.standing}")
    is_new = "base_perplexity" not in study.attributes()
    perplexity = float(study.remember("base_perplexity", lambda: measure_base(engine, folder)))
    progress.event(f"base model on {base.device}, {base.dtype}: validation perplexity {perplexity:.3f}")
    if is_new:
        write_note(study.study, config, space, known["command"], perplexity)
    return engine, study
