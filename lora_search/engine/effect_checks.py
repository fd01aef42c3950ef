"""Checks of a sweep before weights are read: trials that would learn nothing, layers or tokens that the base
lacks, too few rows to tell trials apart."""

import math
from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedModel

from lora_search.data.order import DataAxis
from lora_search.engine.optim import learning_rate
from lora_search.errors import ConfigError, ModelError
from lora_search.files.peft import fault_in_peft
from lora_search.model.embedding import Embedding, check_modules, check_tokens
from lora_search.model.loading import Base, load_outline, untrained_ids
from lora_search.model.packing_check import runs_row_by_row
from lora_search.model.targets import (
    check_biases,
    check_patterns,
    exact_targets,
    in_words,
    left_out,
    target_layers,
)
from lora_search.settings.schema import ALL_LINEAR, ModelConfig, SweepConfig
from lora_search.settings.space import Space, corners
from lora_search.trial import MODULES, TrialSettings

# Standard error of the paired difference between two settings over this many validation rows: it falls with
# their square root. Measured with SmolLM2: 0.6 to 0.85 % over 20 rows, 0.24 to 0.34 % over 129.
STANDARD_ERROR, MEASURED_ROWS = 0.0085, 20
LEAST_ROWS = 128  # show differences of 0.7 %, as there are between good trials
STEP_KEYS = (
    "train.batch_size", "train.gradient_accumulation_steps", "train.epochs", "optim.warmup_ratio",
    "optim.warmup_steps", "optim.schedule", "optim.lr",
)  # fmt: skip


def check_outline(
    source: str,
    model: ModelConfig,
    targets: Sequence[tuple[str, ...]],
    patterns: Sequence[str] = (),
    tokens: Sequence[tuple[tuple[int, ...], bool]] = (),
    biased: Sequence[tuple[str, ...]] = (),
    saved: Sequence[tuple[str, ...]] = (),
) -> tuple[int, int]:
    """Return the size of the base's vocabulary and its width. Raises ModelError, before weights are read, if
    the base is incomplete, a layer, token or bias that a trial may train does not exist, or a name in
    lora.rank_pattern or alpha_pattern is of none that a trial may adapt."""
    outline = load_outline(source, model)
    for names in targets:
        _check_carriers(outline, names)
    for wanted in tokens:
        check_tokens(outline, *wanted)
    check_biases(outline, biased)
    for modules in saved:
        check_modules(outline, modules)
    check_patterns(patterns, [name for names in targets for name in target_layers(outline, names)])
    layers = (outline.get_input_embeddings(), outline.get_output_embeddings())
    shapes = [tuple(layer.weight.shape) for layer in layers if layer is not None]
    return min(vocabulary for vocabulary, _ in shapes), shapes[-1][-1]


def _check_carriers(outline: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Raise ModelError where PEFT would put the adapters elsewhere, or could not load them."""
    layers = target_layers(outline, targets)
    exact = exact_targets(list(layers), [name for name, _ in outline.named_modules()])
    fault = fault_in_peft(outline, layers, exact)
    if fault:
        kind, named = f"a {outline.config.model_type} model", in_words(targets)
        raise ModelError(
            f"lora.target_modules: an adapter on {named} of {kind} could not be loaded in PEFT ({fault}). "
            "Choose other layers, such as q_proj and v_proj, or another base."
        )


def note_left_out(model: PreTrainedModel, targets: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a line where all-linear is searched and means fewer layers than PEFT's."""
    names = ", ".join(left_out(model)) if (ALL_LINEAR,) in targets else ""
    if not names:
        return []
    why = (
        "routers and experts carry no adapters here, nor do layers of images and sound, or those that PEFT "
        "refuses or takes for experts"
    )
    return [f"all-linear leaves out {names}: {why}"]


def note_row_by_row(model: PreTrainedModel) -> list[str]:
    """Return a line where the rows of a pass run alone."""
    if not runs_row_by_row(model):
        return []
    kind = f"a {model.config.model_type} model"
    why = "packed rows would change each other's numbers in this base"
    return [f"{kind}: each row of a pass runs alone, which is slower: {why} (docs/architectures.md)"]


def check_rates(config: SweepConfig, space: Space, axis: DataAxis) -> None:
    """Raise ConfigError if some trial of the space would train nothing."""
    check_effect(corners(config, space, STEP_KEYS), axis)


def check_effect(trials: Iterable[TrialSettings], axis: DataAxis) -> None:
    """Raise ConfigError if a trial would train nothing, as the learning rate of all its steps is 0, or if it
    would end before its warm-up."""
    for settings in trials:
        steps = axis.total_steps(settings)
        epochs = f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''}"
        count = f"{len(axis.examples)} training examples in steps of {settings.examples_per_step}, {epochs}"
        more = "lower train.batch_size, raise train.epochs, or give more data."
        warmup = settings.warmup_steps
        if warmup is not None and warmup >= steps:
            rule = f"must be below the optimizer steps of each trial, and one has {steps} ({count})"
            raise ConfigError("optim.warmup_steps", warmup, rule, f"Lower it, {more}")
        if not any(learning_rate(settings, step, steps) > 0 for step in range(steps)):
            rule = "must leave a step whose learning rate is above 0, as warm-up starts from 0"
            remedy = f"There is no other step ({count}): set optim.warmup_ratio=0, {more}"
            raise ConfigError("optim.warmup_ratio", settings.warmup_ratio, rule, remedy)


def warn_of_few(num_validation: int) -> list[str]:
    """Return a warning if noise hides the differences between trials."""
    unseen, fine = (
        2 * STANDARD_ERROR * math.sqrt(MEASURED_ROWS / rows) for rows in (num_validation, LEAST_ROWS)
    )
    if num_validation >= LEAST_ROWS:
        return []
    return [
        f"warning: with {num_validation} validation row(s), perplexities that differ by less than about "
        f"{unseen:.1%} cannot be told apart; {LEAST_ROWS} rows would show {fine:.1%}. Raise "
        "data.validation_fraction or data.max_validation_examples, or give more data."
    ]


def note_untied(base: Base, saved: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a line where copies of a tied embedding or head part."""
    if not any(saved) or not Embedding(base.model).is_tied:
        return []
    return [
        "lora.modules_to_save: the base's head is tied to its embedding, and a copy of either is not, as in "
        "PEFT: merged weights have both"
    ]


def warn_of_untrained(
    base: Base,
    tokens: Mapping[int, str],
    trained: Sequence[tuple[tuple[int, ...], bool]] = (),
    saved: Sequence[tuple[str, ...]] = (),
) -> list[str]:
    """Return a warning if the template writes control tokens that the base never learned. ``trained``: the
    lists of tokens that trials may train; ``saved``: the modules that trials have copies of."""
    if saved and all(len(names) == len(MODULES) for names in saved):
        return []
    is_tied = Embedding(base.model).is_tied
    learnt = set.intersection(
        *(set(ids if is_tied or with_head else ()) for ids, with_head in trained or [((), False)])
    )
    found = [id for id in untrained_ids(base.model, list(tokens)) if id not in learnt]
    if not found:
        return []
    ids = ",".join(map(str, sorted({*learnt, *found})))
    head = "" if is_tied else " lora.trainable_token_head=true"
    return [
        f"warning: the base never learned the control tokens {', '.join(tokens[id] for id in found)}: their "
        "embeddings are zero, and A and B do not change them. Choose the instruct version of the model, "
        f"template=inst, or train them: lora.trainable_token_indices=[{ids}]{head}"
    ]
