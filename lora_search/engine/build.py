"""Builds an engine of the right size for a sweep: adapted layers, number of slots, size of a pass."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from lora_search.data.rows import Splits
from lora_search.engine.autosize import Demand, Fit, fit
from lora_search.engine.bank import SlotBank
from lora_search.engine.digest import base_record
from lora_search.engine.engine import Engine
from lora_search.engine.packed_model import PackedModel
from lora_search.model.embedding import KEY, MODULES_KEY, check_modules, check_tokens
from lora_search.model.loading import Base
from lora_search.model.targets import check_biases, matches, target_layers
from lora_search.ops.device import available_bytes, devices_of
from lora_search.ops.recompute import recompute_layers
from lora_search.settings.overlay import trial_settings
from lora_search.settings.schema import ALL_LINEAR, SweepConfig, require
from lora_search.trial import TrialSettings

if TYPE_CHECKING:
    from lora_search.settings.space import Space

T = TypeVar("T")
ADAPTER_KEYS = (
    "lora.target_modules", "lora.layers_to_transform", "lora.r", "lora.rank_pattern", "lora.alpha_pattern",
    "lora.use_dora", "lora.init", "lora.trainable_token_indices",
    "lora.trainable_token_head", "lora.modules_to_save", "lora.bias",
)  # fmt: skip

TYPICAL = 64  # draws from a space to know a mean trial


@dataclass(frozen=True)
class Room:
    """What an engine must hold: all possible target modules, the largest rank, the smallest effective batch,
    trials. ``patterns``: the names of layers in lora.rank_pattern and alpha_pattern; ``tokens``: the lists of
    those whose embeddings are trained, and whether their rows of the head are; ``starts``: the inits
    of PiSSA and OLoRA; ``extremes``: trials of which one is the largest; ``typical``: trials as they will
    be drawn; ``biased``: the targets of trials that train biases; ``saved``: the modules that trials have
    copies of."""

    targets: tuple[tuple[str, ...], ...]
    max_rank: int
    min_batch: int
    num_trials: int
    patterns: tuple[str, ...] = ()
    has_dora: bool = False
    starts: tuple[str, ...] = ()
    tokens: tuple[tuple[tuple[int, ...], bool], ...] = ()
    extremes: tuple[TrialSettings, ...] = ()
    typical: tuple[TrialSettings, ...] = ()
    biased: tuple[tuple[str, ...], ...] = ()
    saved: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, trials: Sequence[TrialSettings]) -> "Room":
        """Return the size needed for exactly these trials."""
        return cls(
            targets=_once(trial.target_modules for trial in trials),
            max_rank=max(map(_largest_rank, trials)),
            min_batch=min(trial.examples_per_step for trial in trials),
            num_trials=len(trials),
            patterns=_patterns(trials),
            has_dora=any(trial.use_dora for trial in trials),
            starts=_once(trial.init for trial in trials if trial.has_start),
            tokens=_once((t.trainable_token_indices, t.trainable_token_head) for t in trials),
            extremes=tuple(trials),
            typical=tuple(trials),
            biased=_once(trial.target_modules for trial in trials if trial.trains_biases),
            saved=_once(trial.modules_to_save for trial in trials),
        )

    @classmethod
    def of_space(cls, config: SweepConfig, space: "Space") -> "Room":
        """Return the size needed for any trial of a space."""
        # an engine alone needs no Hydra and no Optuna
        from lora_search.search.forecast import drawn_params
        from lora_search.settings.space import corners, smallest

        trials = corners(config, space, ADAPTER_KEYS)
        keys = ("train.batch_size", "train.gradient_accumulation_steps")
        min_batch = math.prod(smallest(config, space, key) for key in keys)
        drawn = drawn_params(space, TYPICAL, config.seed)
        typical = tuple(trial_settings(config, params) for params in drawn)
        room = cls.of(trials)
        return replace(room, min_batch=min_batch, num_trials=config.study.most_trials, typical=typical)


def require_exact(config: SweepConfig, room: Room, device: torch.device) -> None:
    """Raise ConfigError for PiSSA and OLoRA over a 4-bit base, which PEFT refuses or packs once more; for
    DoRA over one on a CPU: bitsandbytes repacks its weights at the first forward, and neither PEFT nor we can
    then unpack them, which their norms need; for trained tokens and whole modules over several devices."""
    over, remedy = f"over model.quantization={config.model.quantization}", "Set model.quantization=null"
    is_plain = config.model.quantization is None
    rule = f"cannot be pissa or olora {over}, whose weights have no exact factors"
    fits = is_plain or not room.starts
    require(fits, "lora.init", ", ".join(room.starts), rule, f"{remedy}, or lora.init=kaiming")
    devices = config.engine.devices_per_worker
    rule = f"cannot be trained with engine.devices_per_worker={devices}"
    for key, lists in ((KEY, [ids for ids, _ in room.tokens]), (MODULES_KEY, room.saved)):
        wanted = [list(one) for one in lists if one]
        require(devices == 1 or not wanted, key, wanted, rule, "Set engine.devices_per_worker=1")
    allowed = is_plain or not room.has_dora or device.type != "cpu"
    require(allowed, "lora.use_dora", True, f"cannot be true {over} on a CPU", f"{remedy}, or use a GPU")


def _once(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def _largest_rank(trial: TrialSettings) -> int:
    return max(trial.r, *(int(r) for _, r in trial.rank_pattern), 1)


def _patterns(trials: Sequence[TrialSettings]) -> tuple[str, ...]:
    return _once(name for t in trials for name, _ in (*t.rank_pattern, *t.alpha_pattern))


def build_engine(
    config: SweepConfig, room: Room, base: Base, splits: Splits, content: Mapping[str, str]
) -> tuple[Engine, str]:
    """Return an engine of that size, and how the size was chosen ("" if it was set).

    ``content`` holds digests of what the numbers depend on; the engine stores them with its files. Raises
    ModelError if a target does not exist.
    """
    require_exact(config, room, base.device)
    layers: dict[str, nn.Linear] = {}
    for wanted in room.tokens:
        check_tokens(base.model, *wanted)
    for modules in room.saved:
        check_modules(base.model, modules)
    check_biases(base.model, room.biased)
    record = base_record(config, base, splits, content)  # before adapters are added
    for targets in room.targets:
        layers |= target_layers(base.model, targets)
    everything = target_layers(base.model, (ALL_LINEAR,))
    layers = {name: layer for name, layer in everything.items() if name in layers}
    if config.engine.gradient_checkpointing is True:
        recompute_layers(base.model)
    chosen = _fit(config, room, base, splits, layers)
    bank = _bank(base, room, layers, chosen.slots)
    engine = Engine(
        PackedModel(base.model, bank),
        bank,
        splits,
        data_seed=config.seed,
        tokens_per_pass=chosen.tokens_per_pass,
        base=record,
        resolve_targets=partial(_matching, layers),
        bank_bytes=chosen.bank_bytes,
    )
    return engine, chosen.note


def _matching(names: Iterable[str], targets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if matches(name, targets))


def _bank(base: Base, room: Room, layers: Mapping[str, nn.Linear], slots: int) -> SlotBank:
    return SlotBank(
        base.model,
        layers,
        slots,
        room.max_rank,
        base.dtype,
        trains_rows=any(ids for ids, _ in room.tokens) or any(room.saved),
    )


def largest_adapter(engine: Engine, room: Room) -> int:
    """Return the bytes on disk of the largest adapter of the room's trials."""
    return 4 * max(
        (1 + trial.has_start)
        * sum(engine.bank.layout(trial, engine.resolve_targets(trial.target_modules)).sizes)
        for trial in room.extremes
    )


def _heaviest(config: SweepConfig, room: Room) -> TrialSettings:
    """Return a trial with all that may take memory in a pass of the room's trials."""
    saved = max(room.saved, key=len, default=())
    ids, with_head = max(room.tokens, key=lambda one: len(one[0]) * (1 + one[1]), default=((), False))
    return replace(
        trial_settings(config, {}),
        r=room.max_rank,
        rank_pattern=(),
        use_dora=room.has_dora,
        init=next(iter(room.starts), "kaiming"),
        trainable_token_indices=() if saved else ids,
        trainable_token_head=with_head and not saved,
        bias="lora_only" if room.biased else "none",
        modules_to_save=saved,
    )


def _fit(config: SweepConfig, room: Room, base: Base, splits: Splits, layers: Mapping[str, nn.Linear]) -> Fit:
    """Choose the auto settings by a probe with one slot; the model is left unchanged."""
    slots, tokens = config.engine.slots, config.engine.tokens_per_pass
    if isinstance(slots, int) and isinstance(tokens, int):
        return Fit(slots, tokens)
    bank = _bank(base, room, layers, 1)
    heaviest = _heaviest(config, room)
    bank.make_room(0, heaviest, bank.names)  # zeros: values take no memory
    bank.refresh(0)
    model, demand = PackedModel(base.model, bank), _demand(bank, room)
    sharing = (config.launcher.workers or 1) if base.device.type == "cpu" else 1  # one GPU each, one memory
    free, batch = available_bytes(devices_of(base.model)) // sharing, room.min_batch
    if base.device.type == "cpu":
        free -= bank.factor_bytes * len(room.starts)
    chosen = fit(config.engine, model, splits.train, batch, demand, room.num_trials, free)
    bank.remove(base.model)
    return chosen


def _demand(bank: SlotBank, room: Room) -> Demand:
    """Return what the room's trials take in a slot."""
    largest, typical = (
        [bank.bytes_of(trial, _matching(bank.names, trial.target_modules)) for trial in trials]
        for trials in (room.extremes, room.typical)
    )
    return Demand(max(largest), sum(typical) / len(typical))
