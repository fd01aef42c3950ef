"""Checks before a study is opened or continued. They write nothing."""

import json
import time

import optuna

from lora_search.database.sqlite_file import MOST_WORKERS, TO_A_SERVER
from lora_search.database.storage import quieten_optuna
from lora_search.database.stored_study import outline_of
from lora_search.errors import ConfigError
from lora_search.search.pruning import make_pruner
from lora_search.search.sampling import Chosen, make_sampler
from lora_search.settings.schema import PrunerConfig, SamplerConfig, StudyConfig, SweepConfig, require
from lora_search.settings.space import Space, largest
from lora_search.study.budget import KEY, Interval, is_at_work
from lora_search.study.identity import Identity

OURS = {"fingerprint", "base_perplexity", "sweep"}  # attributes in the studies of all our versions
FACTOR = "pruner.reduction_factor"
REMEDY = "Choose another study.name, or another study.storage."


def check_adoptable(config: StudyConfig) -> None:
    """Raise ConfigError if another program created the study for another purpose."""
    found = outline_of(config)
    if found is None:
        return
    if found.directions != ("MINIMIZE",):
        goals = ", ".join(direction.lower() for direction in found.directions)
        rule = f"must be a study that minimizes one value, and the existing one has the goals: {goals}"
        raise ConfigError("study.name", config.name, rule, REMEDY)
    if found.has_trials and not found.attributes & OURS:
        rule = "must be new or a study of lora_search, and the existing one has another program's trials"
        raise ConfigError("study.name", config.name, rule, REMEDY)


def check_room(config: StudyConfig) -> None:
    """Raise ConfigError if as many workers are at work as SQLite can hold, from whichever terminals."""
    found = outline_of(config) if config.storage.startswith("sqlite") else None
    system = {} if found is None else found.system
    known = {key: Interval(*json.loads(text)) for key, text in system.items() if key.startswith(KEY)}
    count = sum(is_at_work(key, one, time.time()) for key, one in known.items())
    if count >= MOST_WORKERS:
        rule = f"has {count} workers at work, and SQLite lets one write at a time"
        raise ConfigError("study.storage", config.storage, rule, TO_A_SERVER)


def keep_rule(config: PrunerConfig, identity: Identity | None) -> None:
    """Fix the reduction factor of a study: that of its first start. In version 0.1 the default was 3."""
    if config.reduction_factor is None:
        known = {} if identity is None else {FACTOR: "3", **identity.fingerprint}
        config.reduction_factor = int(known.get(FACTOR, config.factor))


def check_study(
    config: SweepConfig, space: Space
) -> tuple[optuna.samplers.BaseSampler, optuna.pruners.BasePruner]:
    """Return sampler and pruner. Raises ConfigError if they do not fit this space or these rungs."""
    quieten_optuna()
    num_rungs = largest(config, space, "train.epochs") * config.train.evals_per_epoch
    if config.pruner.chooses:
        name, rule = config.sampler.name, f"draws nothing beside pruner={config.pruner.name}"
        remedy = "Leave sampler out: the rule chooses new settings itself"
        require(name in (SamplerConfig().name, "random"), "sampler.name", name, rule, remedy)
        return Chosen(config.seed), make_pruner(config.pruner, num_rungs)
    sampler = make_sampler(config.sampler, space.distributions, config.seed, space.parents)
    return sampler, make_pruner(config.pruner, num_rungs)
