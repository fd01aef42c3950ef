"""One trial's settings: the sweep's, overridden by the trial's parameters, checked by each key's rules."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from types import UnionType
from typing import Any, get_args

from lora_search.errors import ConfigError
from lora_search.settings.schema import ALL_LINEAR, LoraConfig, OptimConfig, SweepConfig, TrainConfig
from lora_search.settings.train_schema import INIT_REMEDY
from lora_search.trial import LAYERS, MODULES, PATTERN, Pattern, TrialSettings, draw_seed

SECTIONS: dict[str, type] = {"lora": LoraConfig, "optim": OptimConfig, "train": TrainConfig}
FIXED = ("train.evals_per_epoch", "train.loss_on")  # all trials are compared at the same rungs and tokens


def trial_settings(config: SweepConfig, params: Mapping[str, object]) -> TrialSettings:
    """Return one trial's settings: the sweep's, overridden by the trial's parameters."""
    lora, optim, train = (_overlay(config, section, params) for section in ("lora", "optim", "train"))
    assert isinstance(lora, LoraConfig)
    assert isinstance(optim, OptimConfig)
    assert isinstance(train, TrainConfig)
    return TrialSettings(
        r=lora.r, alpha=lora.alpha_for_rank(lora.r), dropout=lora.dropout,
        target_modules=_targets(lora), use_rslora=lora.use_rslora, use_dora=lora.use_dora,
        rank_pattern=tuple((lora.rank_pattern or {}).items()), alpha_pattern=_alphas(lora), init=lora.init,
        lr=optim.lr, weight_decay=optim.weight_decay, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps,
        max_grad_norm=optim.max_grad_norm, schedule=optim.schedule,  # type: ignore[arg-type]  # checked by OptimConfig
        warmup_ratio=optim.warmup_ratio, batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps, epochs=train.epochs,
        evals_per_epoch=train.evals_per_epoch, early_stopping_patience=train.early_stopping_patience,
        warmup_steps=optim.warmup_steps, min_lr_ratio=optim.min_lr_ratio, decay_ratio=optim.decay_ratio,
        trainable_token_indices=tuple(lora.trainable_token_indices or ()),
        trainable_token_head=lora.trainable_token_head,
        modules_to_save=tuple(name for name in MODULES if name in (lora.modules_to_save or ())),
        bias=lora.bias,  # type: ignore[arg-type]  # checked by LoraConfig
        lora_plus_ratio=optim.lora_plus_ratio, neftune_alpha=train.neftune_alpha,
        label_smoothing=train.label_smoothing,
    )  # fmt: skip


def _targets(lora: LoraConfig) -> tuple[str, ...]:
    """Return names, all-linear or a pattern, and the layers that they are limited to, as TrialSettings has
    them."""
    names, layers = lora.target_modules, lora.layers_to_transform
    if isinstance(names, str):
        names = [names if names == ALL_LINEAR else f"{PATTERN}{names}"]
    numbers = layers if isinstance(layers, list) else [layers]
    limits = [] if layers is None else [LAYERS + ",".join(str(number) for number in sorted(numbers))]
    return (*names, *limits)


def _alphas(lora: LoraConfig) -> Pattern:
    """Return alpha_pattern; where alpha is a multiple of the rank, layers of another rank have another."""
    ranks, alphas = lora.rank_pattern or {}, lora.alpha_pattern or {}
    is_tied = str(lora.alpha).endswith("r")
    tied = {name: lora.alpha_for_rank(r) for name, r in ranks.items() if is_tied and name not in alphas}
    return tuple({**alphas, **tied}.items())


def trial_seed(config: SweepConfig, params: Mapping[str, object], number: int) -> int:
    """Return the seed of a trial's adapter init and dropout: train.seed where it is given, the sweep's or the
    trial's own, else one that depends on the sweep's seed and the trial's number."""
    train = _overlay(config, "train", params)
    assert isinstance(train, TrainConfig)
    return draw_seed(config.seed, number) if train.seed is None else train.seed


def searchable_keys() -> list[str]:
    """Return the keys that may differ between the trials of a sweep."""
    keys = [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in fields(cls)]
    return [key for key in keys if key not in FIXED]


def _overlay(config: SweepConfig, section: str, params: Mapping[str, object]) -> object:
    mine = {k.partition(".")[2]: decoded(v) for k, v in params.items() if k.startswith(f"{section}.")}
    for name, value in mine.items():
        _check_type(f"{section}.{name}", value)
    return replace(getattr(config, section), **mine)


def _check_type(key: str, value: object) -> None:
    types = declared_types(key)
    if object in types:
        return  # its class checks it
    allowed = (*types, int) if float in types else types
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in types):
        shown = " or ".join(t.__name__ for t in types if t is not type(None))
        remedy = INIT_REMEDY if key == "lora.init" else ""
        raise ConfigError(key, value, f"must be of type {shown}", remedy)


def declared_types(key: str) -> tuple[type, ...]:
    """Return the declared types of the key's field; object for Any."""
    section, _, name = key.partition(".")
    declared = next(f.type for f in fields(SECTIONS[section]) if f.name == name)
    if isinstance(declared, UnionType):
        return get_args(declared)
    return (object,) if declared is Any or not isinstance(declared, type) else (declared,)


def value_of(config: SweepConfig, key: str) -> object:
    section, _, name = key.partition(".")
    value: object = getattr(getattr(config, section), name)
    return value


def encoded(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict) else value


def decoded(value: object) -> object:
    """Return the list or mapping that a choice was encoded from."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        with suppress(ValueError):  # a regular expression may begin so
            return json.loads(value)
    return value
