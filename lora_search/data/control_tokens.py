"""Finds text in the data that spells a control token, such as <|im_end|>, which the tokenizer would turn into
one."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from lora_search.errors import ConfigError, DataError
from lora_search.reading.rows import Row
from lora_search.settings.schema import SweepConfig

SHOWN_ROWS = 3
KEEP = "To train on them as control tokens, set data.on_control_text=keep."


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of the tokenizer's special tokens."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added} - {""})


def control_tokens_of(used: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the control tokens among the ids that the rows use: id -> text."""
    known = {int(id): text for text in control_tokens(tokenizer)
             if (id := tokenizer.convert_tokens_to_ids(text)) is not None}  # fmt: skip
    return {int(id): known[int(id)] for id in sorted(used) if int(id) in known}


def check_control_text(
    config: SweepConfig, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, counts: Counter[str]
) -> None:
    """Count the rows that spell a control token; raise DataError, with their places, unless they are kept."""
    tokens = control_tokens(tokenizer)
    if not tokens:
        return
    spelled = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
    refuse = config.data.on_control_text == "refuse"
    system = spelled.search(config.template.system_prompt or "")
    if system is not None and refuse:
        rule, key = f"spells {system[0]}, a control token of the model", "template.system_prompt"
        raise ConfigError(key, config.template.system_prompt, rule, f"Remove it. {KEEP}")
    hits = [
        (row.source, part, hit[0])
        for row in rows
        for part, text in _texts(row)
        if (hit := spelled.search(text)) is not None
    ]
    num_rows = len({source for source, _, _ in hits})
    if num_rows and refuse:
        shown = "\n  ".join(f"{source}: the {part} spells {hit}" for source, part, hit in hits[:SHOWN_ROWS])
        raise DataError(
            f"data.on_control_text: {num_rows} rows have text that becomes a control token of the model:\n  "
            f"{shown}\nRemove it from the text. {KEEP}"
        )
    counts["rows whose text spells a control token (kept)"] = num_rows


def _texts(row: Row) -> list[tuple[str, str]]:
    """Return the texts of a row with their parts; a conversation is one text."""
    if row.messages:
        return [("conversation", row.messages), ("list of tools", row.tools)]
    return [("question", row.question), ("answer", row.response)]
