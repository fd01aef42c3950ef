"""Reopens a study's base and data from its recorded settings, for commands that compute after the search.

Data or a base that have changed since are refused: their numbers would not be the study's. Imports torch.
"""

from collections.abc import Sequence
from dataclasses import replace

from lora_search.data.store import knows_rows
from lora_search.engine.build import Room
from lora_search.engine.engine import Engine
from lora_search.prepare import Inputs, open_engine, read_inputs
from lora_search.reading.load import load_rows
from lora_search.settings.schema import SweepConfig
from lora_search.study.fingerprint import check_fingerprint
from lora_search.study.identity import Identity, find_identity
from lora_search.trial import TrialSettings


def reopen(config: SweepConfig, trials: Sequence[TrialSettings], num_slots: int | str) -> Engine:
    """Return an engine with room for these trials, ``num_slots`` at a time, or auto.

    Raises FingerprintError if rows, base or template have changed.
    """
    sized = replace(config, engine=replace(config.engine, slots=num_slots))
    inputs = read_again(config)
    return open_engine(sized, Room.of(trials), inputs)[0]


def identity_of(config: SweepConfig) -> Identity:
    """Return what the study recorded at its first start; an empty identity where there is none."""
    return find_identity(config.study) or Identity()


def read_again(config: SweepConfig) -> Inputs:
    """Return rows, tokenizer and template of the study. Raises FingerprintError if they have changed."""
    identity = identity_of(config)
    rows = load_rows(config.data, None, knows_rows, commits=identity.commits_of(config.data))
    inputs, stored = read_inputs(config, rows, identity), identity.fingerprint
    known = [key for key in inputs.content if key in stored]
    wanted = {key: inputs.content[key] for key in known}
    check_fingerprint(config.study.name, {key: stored[key] for key in known}, wanted)
    return inputs
