"""Digests of a sweep's data: the tokens of every split, and the chat template."""

import hashlib
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_search.data.rows import Example, Splits
from lora_search.data.store import kept_digest
from lora_search.settings.schema import TemplateConfig


def data_content(
    splits: Splits, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Return the digests of the data that a trial's numbers depend on."""
    content = {
        "data_hash": splits.data_hash,
        "content.train": kept_digest(splits.train, lambda: _examples(splits.train)),
        "content.validation": kept_digest(splits.validation, lambda: _examples(splits.validation)),
        "content.test": kept_digest(splits.test, lambda: _examples(splits.test)),
    }
    if template.name == "chat":
        content["content.chat_template"] = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()
    return content


def _examples(examples: Sequence[Example]) -> str:
    """Return a digest of tokens, prompt lengths, masks and weights in order: that of an epoch."""
    digest = hashlib.sha256()
    for example in examples:
        masked = [bound for part in example.masked for bound in part]
        ids = np.array(
            [len(example.input_ids), example.num_prompt_tokens, *example.input_ids, *masked], dtype="<i8"
        )
        digest.update(ids.tobytes())
        if example.weight != 1.0:
            digest.update(repr(example.weight).encode())
    return digest.hexdigest()
