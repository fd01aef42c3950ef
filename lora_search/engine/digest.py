"""Digests of everything that a trial's numbers depend on, except its settings and seed."""

import hashlib
import json
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from lora_search.data.digest import data_content
from lora_search.data.rows import Splits
from lora_search.files.peft import BaseRecord
from lora_search.model.digest import base_content, layers_content
from lora_search.model.loading import Base
from lora_search.settings.schema import ModelConfig, SweepConfig

DIGESTED = (  # the origin in checkpoints and adapters: a change here would make all existing ones useless
    "content.weights", "content.config", "content.code", "content.tokenizer", "content.train",
    "content.validation", "content.test", "content.layers", "content.float32_matmul", "engine.dtype",
    "model.quantization",
)  # fmt: skip


def content_before_loading(
    config: SweepConfig, source: str, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, splits: Splits
) -> dict[str, str]:
    """Return the digests known before the model is loaded; ``model`` names the commit of a hub id."""
    return base_content(source, model, tokenizer) | data_content(splits, config.template, tokenizer)


def content_of(
    before: Mapping[str, str], base: Base, model: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Return all digests, with those of weights fetched from the hub and the dtype that `auto` chose."""
    weights = {} if "content.weights" in before else base_content(base.source, model, tokenizer)
    dtype = {"engine.dtype": str(base.dtype).removeprefix("torch.")}
    return {**before, **weights, **layers_content(base.model), **dtype}


def base_record(config: SweepConfig, base: Base, splits: Splits, content: Mapping[str, str]) -> BaseRecord:
    """Return the adapters' record of the base, which must carry no adapters yet."""
    return BaseRecord(
        path=base.source,
        revision=content.get("content.commit"),
        module_names=tuple(name for name, _ in base.model.named_modules()),
        digest=digest_of({**content, "model.quantization": str(config.model.quantization)}),
        data_hash=splits.data_hash,
    )


def digest_of(fingerprint: Mapping[str, str]) -> str:
    """Return one digest of everything that a trial's numbers depend on, except its settings and seed."""
    parts = {key: fingerprint[key] for key in DIGESTED if key in fingerprint}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
