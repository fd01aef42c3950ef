"""Reopens a study's base and data from its recorded settings, for commands that compute after the search.

Data or a base that have changed since are refused: their numbers would not be the study's. Imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from lora_search.data.rows import Splits
from lora_search.data.store import knows_rows
from lora_search.engine.build import Room, build_engine
from lora_search.engine.digest import content_of
from lora_search.engine.engine import Engine
from lora_search.model.loading import load_base
from lora_search.prepare import Inputs, commits_of, read_inputs
from lora_search.reading.load import load_rows
from lora_search.settings.schema import SweepConfig
from lora_search.study.fingerprint import check_fingerprint
from lora_search.study.identity import find_identity
from lora_search.trial import TrialSettings


@dataclass(frozen=True)
class Reopened:
    """The engine and data to compute with a study's adapters."""

    config: SweepConfig
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    engine: Engine
    study_id: str


def reopen(config: SweepConfig, trials: Sequence[TrialSettings], num_slots: int | str) -> Reopened:
    """Return an engine with room for these trials, ``num_slots`` at a time, or auto.

    Raises FingerprintError if rows, base or template have changed.
    """
    inputs, identity = read_again(config), find_identity(config.study)
    sized = replace(config, engine=replace(config.engine, slots=num_slots))
    base = load_base(inputs.source, inputs.model, config.engine)
    content = content_of(inputs.content, base, inputs.model, inputs.tokenizer)
    engine, _ = build_engine(sized, Room.of(trials), base, inputs.splits, content)
    study_id = identity.id if identity is not None and identity.id else ""
    return Reopened(config, inputs.tokenizer, inputs.splits, engine, study_id)


def read_again(config: SweepConfig) -> Inputs:
    """Return rows, tokenizer and template of the study. Raises FingerprintError if they have changed."""
    identity = find_identity(config.study)
    inputs = read_inputs(
        config, load_rows(config.data, None, knows_rows, commits=commits_of(identity, config.data)), identity
    )
    stored = identity.fingerprint if identity is not None else {}
    known = [key for key in inputs.content if key in stored]
    wanted = {key: inputs.content[key] for key in known}
    check_fingerprint(config.study.name, {key: stored[key] for key in known}, wanted)
    return inputs
