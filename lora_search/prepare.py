"""From settings to an engine and a study that are ready to search, with all checks on the way.

Folders and database come first, then the rows, then settings that do not fit the rows, the model last.
Imports torch, so `sweep` imports this module only before training.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_search.data.control_tokens import control_tokens_of
from lora_search.data.order import DataAxis
from lora_search.data.preparation import SPLITS, pairs_text, prepare, write_pairs
from lora_search.data.rows import Splits
from lora_search.data.serving import write_serving
from lora_search.data.store import knows_rows, token_counts, used_tokens
from lora_search.data.tokens import LENGTH, check_vocabulary
from lora_search.engine.build import Room, build_engine, require_exact
from lora_search.engine.digest import content_before_loading, content_of
from lora_search.engine.effect_checks import (
    check_outline,
    check_rates,
    note_left_out,
    note_row_by_row,
    note_untied,
    warn_of_few,
    warn_of_untrained,
)
from lora_search.engine.engine import Engine
from lora_search.errors import ConfigError
from lora_search.files.artifacts import Artifacts, place_of
from lora_search.files.atomic import explained_writing, refused_writing
from lora_search.files.place import check_uri
from lora_search.files.row_scores import BASE, write_scores
from lora_search.model.loading import Base, load_base, load_tokenizer, pin_model, resolve_model
from lora_search.model.placement import describe_split
from lora_search.ops.cores import notes_on_cores
from lora_search.ops.device import pick_devices
from lora_search.output.dashboard_note import write_note
from lora_search.output.shared_files import share
from lora_search.output.terminal import Progress
from lora_search.reading.load import load_rows
from lora_search.reading.rows import Loaded
from lora_search.results.formatting import show_seconds
from lora_search.settings.schema import ModelConfig, SweepConfig, require
from lora_search.settings.secrets import redact
from lora_search.settings.space import Space, largest
from lora_search.study.fingerprint import (
    DATA_COMMIT,
    check_fingerprint,
    known_so_far,
    refuse_changes,
    settings_part,
    space_part,
)
from lora_search.study.folder import check_folder, claim_folder, find_owned, study_folder
from lora_search.study.identity import Identity
from lora_search.study.opening_checks import check_adoptable, check_room, keep_rule
from lora_search.study.provenance import LENGTHS, attributes, length_histogram
from lora_search.study.study import BASE_WIDTH, SweepStudy
from lora_search.watching import Watch, unwatched
from lora_search.worker.command import typed_command

BASE_TOLERANCE = {"float32": 1e-4}  # of a base's perplexity: devices and kernels differ in rounding
LOW_PRECISION_TOLERANCE = 5e-3


def check_places(config: SweepConfig) -> Identity | None:
    """Return the identity of the study, if it exists. Creates nothing. Raises if the folder is not writable
    or another study's, if the database cannot be used or has another program's study of that name, or if
    artifacts.uri accepts no files."""
    folder = Path(config.runs_dir) / config.study.name
    refusal = refused_writing(folder)
    if refusal is not None:
        rule = f"must be a writable folder ({refusal})"
        raise ConfigError("runs_dir", config.runs_dir, rule, "Give another folder.")
    check_folder(config.study, folder.parent)
    check_adoptable(config.study)
    check_room(config.study)
    identity = find_owned(config.study, folder)
    if config.artifacts.uri is not None:
        check_uri(config.artifacts.uri)
    return identity


def check_amount(config: SweepConfig, space: Space, num_train: int) -> None:
    """Raise ConfigError if one optimizer step takes more examples than there are: the learning rate would
    still be warming up at the trial's end."""
    batch_size = largest(config, space, "train.batch_size")
    steps = largest(config, space, "train.gradient_accumulation_steps")
    key = "train.batch_size" if steps == 1 else "train.batch_size * train.gradient_accumulation_steps"
    rule = f"must be at most the number of training examples, {num_train}"
    require(batch_size * steps <= num_train, key, batch_size * steps, rule, "Lower it, or give more data.")
    rungs = config.train.evals_per_epoch
    require(rungs <= num_train, "train.evals_per_epoch", rungs, rule)


def describe_search(config: SweepConfig, space: Space) -> list[str]:
    """Return one line with the searched keys, and one for fixed values that no trial will use."""
    if not space.expressions:
        return ["searching nothing: one trial with the given settings"]
    lines = [f"searching {', '.join(f'{key} {text}' for key, text in space.expressions.items())}"]
    if config.pruner.chooses:
        lines.append(f"pruner={config.pruner.name} chooses new settings too: no sampler draws them")
    outside = space.outside(config)
    if outside and config.study.first_trial_is_default:
        given = ", ".join(f"{key}={value}" for key, value in outside.items())
        lines.append(f"{given} is outside the searched range: the first trial is drawn like the others")
    return lines


def describe_rows(config: SweepConfig, splits: Splits) -> list[str]:
    """Return the counts of rows used, read and left out, and their lengths: a few facts in each line."""
    is_length = {key: key.startswith(LENGTH) for key in splits.counts}
    used = ", ".join(f"{splits.counts[name]} {name}" for name in SPLITS if name in splits.counts)
    others = [
        f"{count} {key}" for key, count in splits.counts.items() if not is_length[key] and key not in SPLITS
    ]
    further = [f"  {', '.join(others[i : i + 3])}" for i in range(0, len(others), 3)]
    lengths = [f"{key.removeprefix(LENGTH)} {n}" for key, n in splits.counts.items() if is_length[key]]
    chosen = f"rows are cut at {splits.max_length} tokens (data.max_length={config.data.max_length})"
    return [f"data {config.data.name}: {used} rows", *further, f"{chosen}; before that:{','.join(lengths)}"]


def describe_validation(engine: Engine, seconds: float) -> str:
    """Return what the validation rows cost, by one measurement of the base alone."""
    rows, trained = len(engine.splits.validation), len(engine.splits.train)
    return (
        f"validation: measuring {rows} rows took {show_seconds(seconds)} and comes once a rung; "
        f"{trained} rows are trained on in an epoch"
    )


def measure_base(engine: Engine, folder: Path) -> str:
    """Return the bare base's validation perplexity; write its scores of the rows to the folder."""
    scores = engine.evaluate_base()
    write_scores(folder, scores, 0, BASE)
    return repr(scores.perplexity)


@dataclass(frozen=True)
class Inputs:
    """The files that the settings name, except the weights. ``content``: their digests."""

    source: str
    model: ModelConfig  # at the commit that a hub id names
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    content: dict[str, str]
    width: int  # of the base


def read_inputs(
    config: SweepConfig,
    rows: Loaded,
    identity: Identity | None,
    room: Room | None = None,
    watch: Watch = unwatched,
) -> Inputs:
    """Return rows, tokenizer and template as the model will see them. A hub id stays at the commit that the
    study was started with. Raises ModelError if the base is incomplete or lacks a target layer."""
    source = resolve_model(config.model)
    model = pin_model(source, config.model, identity.commit if identity else None)
    wanted = (room.targets, room.patterns, room.tokens, room.biased, room.saved) if room else ((),)
    num_embeddings, width = check_outline(source, model, *wanted)
    tokenizer = load_tokenizer(source, model)
    splits = prepare(config, rows, tokenizer, watch=watch)
    used = used_tokens(splits.parts)
    check_vocabulary(config.model.path, used, tokenizer, num_embeddings)
    content = content_before_loading(config, source, model, tokenizer, splits)
    content |= {f"{DATA_COMMIT}{path}": commit for path, commit in rows.revisions.items()}
    return Inputs(source, model, tokenizer, splits, content, width)


def open_engine(config: SweepConfig, room: Room, inputs: Inputs) -> tuple[Engine, str]:
    """Return the engine on these inputs, with the base loaded, and how its size was chosen."""
    base = load_base(inputs.source, inputs.model, config.engine)
    content = content_of(inputs.content, base, inputs.model, inputs.tokenizer)
    return build_engine(config, room, base, inputs.splits, content)


def check_inputs(config: SweepConfig, space: Space, inputs: Inputs, identity: Identity | None) -> None:
    """Check rows and settings, and compare them with the study's first start, as far as that is possible
    before the model is loaded. Raises InputError or FingerprintError."""
    check_amount(config, space, len(inputs.splits.train))
    check_rates(config, space, DataAxis(inputs.splits.train, config.seed))
    if identity is not None and identity.fingerprint:
        wanted = {**settings_part(config), **inputs.content, **space_part(space)}
        stored = known_so_far(identity.fingerprint, wanted)
        dtype = {key: stored[key] for key in ("engine.dtype",) if key in stored}
        check_fingerprint(config.study.name, stored, {**wanted, **dtype})


def check_older(
    config: SweepConfig, identity: Identity | None, engine: Engine, content: Mapping[str, str]
) -> None:
    """Raise FingerprintError if a study of a version that stored no digests would continue with another base,
    or with rows that this version renders differently."""
    if identity is None or not identity.is_older or "content.layers" in identity.fingerprint:
        return
    changed = []
    tolerance = BASE_TOLERANCE.get(content["engine.dtype"], LOW_PRECISION_TOLERANCE)
    kept = Path(config.runs_dir) / config.study.name / "data" / "train.jsonl"
    if kept.is_file() and kept.read_text(encoding="utf-8") != pairs_text(engine.splits.pairs["train"]):
        changed.append("the training rows changed, as the model reads them")
    if identity.base_perplexity is not None:
        now = engine.evaluate_base().perplexity
        if not math.isclose(now, identity.base_perplexity, rel_tol=tolerance):
            perplexities = f"validation perplexity {identity.base_perplexity:.6g} -> {now:.6g}"
            changed.append(f"the base model or the validation rows changed: {perplexities}")
    refuse_changes(config.study.name, changed)


def prepare_sweep(
    config: SweepConfig, sweep_name: str, space: Space, progress: Progress
) -> tuple[Engine, SweepStudy]:
    """Return engine and study, ready to search: data read and split, base loaded and measured."""
    room = Room.of_space(config, space)
    device, *_ = pick_devices(config.engine.device, config.engine.devices_per_worker)
    require_exact(config, room, device)
    progress.events(notes_on_cores() if device.type == "cpu" else ())
    identity = check_places(config)
    keep_rule(config.pruner, identity)
    commits = identity.commits_of(config.data) if identity is not None else {}
    rows = load_rows(config.data, None, knows_rows, progress.watch, commits)
    progress.events(rows.notes)
    progress.event(f"base model {config.model.path}: reading")
    inputs = read_inputs(config, rows, identity, room, progress.watch)
    progress.events([*describe_rows(config, inputs.splits), *warn_of_few(len(inputs.splits.validation))])
    check_inputs(config, space, inputs, identity)
    base = load_base(inputs.source, inputs.model, config.engine)
    control = control_tokens_of(used_tokens(inputs.splits.parts), inputs.tokenizer)
    progress.events(warn_of_untrained(base, control, room.tokens, room.saved))
    notes = (
        note_row_by_row(base.model),
        note_left_out(base.model, room.targets),
        note_untied(base, room.saved),
    )
    progress.events(itertools.chain(*notes))
    content = content_of(inputs.content, base, inputs.model, inputs.tokenizer)
    engine, sizes = build_engine(config, room, base, inputs.splits, content)
    if sizes:
        progress.event(f"engine: {sizes}")
    check_older(config, identity, engine, content)
    study = open_study(config, sweep_name, space, inputs, content, progress)
    if config.artifacts.uri is not None:
        engine.keep_copies(Artifacts(config.artifacts.uri, place_of(config.study.name, study.identity.id)))
    if config.launcher.worker is None:  # a launcher's worker has a log of its own
        progress.log.open(study.folder)
    for change in study.changes:
        progress.event(f"study {config.study.name}: changed {change}")
    generation = base.model.generation_config.to_diff_dict()
    write_serving(study.folder / "tokenizer", inputs.tokenizer, config.template, generation)
    progress.event(f"study {config.study.name}: {study.standing}")
    _know_base(config, space, base, engine, study, progress)
    if not study.is_finished:  # before a trial is held: the largest layers take seconds
        engine.bank.factors.prepare(room.starts, progress.watch)
    return engine, study


def _know_base(
    config: SweepConfig, space: Space, base: Base, engine: Engine, study: SweepStudy, progress: Progress
) -> None:
    """Measure the base, unless the study knows it, and show its perplexity."""
    is_new, began = "base_perplexity" not in study.attributes(), time.perf_counter()
    perplexity = study.remember("base_perplexity", lambda: measure_base(engine, study.folder))
    places = describe_split(base.model) or base.device
    progress.event(f"base model on {places}, {base.dtype}: validation perplexity {perplexity:.3f}")
    if is_new:
        progress.event(describe_validation(engine, time.perf_counter() - began))
        write_note(study.study, config, space, redact(typed_command(sys.argv)), perplexity)
        share(study.folder, engine.keeper.artifacts)


def open_study(
    config: SweepConfig,
    sweep_name: str,
    space: Space,
    inputs: Inputs,
    content: Mapping[str, str],
    progress: Progress,
) -> SweepStudy:
    """Return the study, with its folder claimed and the rows written there.

    The budget counts this process's time from when ``progress`` began.
    """
    command, folder = typed_command(sys.argv), study_folder(config)
    known = attributes(config, sweep_name, command, inputs.source, inputs.splits, content)
    known[BASE_WIDTH] = str(inputs.width)
    lengths = token_counts(inputs.splits.train)
    known["data.train_tokens"] = str(sum(lengths))
    known[LENGTHS] = json.dumps(length_histogram(lengths))
    study = SweepStudy.open(
        config, space, {**settings_part(config), **content}, known, folder, began=progress.began
    )
    claim_folder(folder, config.study.name, study.identity)
    with explained_writing(folder):
        write_pairs(inputs.splits, folder / "data", progress.watch, inputs.content)
    return study
