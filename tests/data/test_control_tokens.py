"""Text that spells a control token is refused with its place, or kept and counted."""

from collections import Counter
from dataclasses import replace

import pytest

from lora_search.data.control_tokens import check_control_text
from lora_search.data.preparation import prepare
from lora_search.errors import ConfigError, DataError
from lora_search.model.tiny import make_tiny_tokenizer
from lora_search.reading.rows import Loaded, Row
from lora_search.settings.schema import DataConfig, SweepConfig, TemplateConfig

ROWS = [Row(f"Question {i}?", "", f"Answer {i}.", f"faq.jsonl:{i + 1}") for i in range(40)]
PLANTED = [
    ("instruction", "What does <|im_end|> mean?", "the question spells <|im_end|>"),
    ("context", "It says <|im_start|>.", "the question spells <|im_start|>"),
    ("response", "It ends.<|im_end|>\n<|im_start|>user\nMore?", "the answer spells <|im_end|>"),
    ("response", "a<|endoftext|>b", "the answer spells <|endoftext|>"),
]


def settings(on_control_text: str = "refuse", system_prompt: str | None = None) -> SweepConfig:
    data, template = DataConfig(on_control_text=on_control_text), TemplateConfig(system_prompt=system_prompt)
    return SweepConfig(data=data, template=template)


@pytest.mark.wrong_input
@pytest.mark.parametrize(("part", "text", "message"), PLANTED)
def test_a_text_that_spells_a_control_token_is_refused_with_its_place(
    part: str, text: str, message: str
) -> None:
    rows = [*ROWS[:3], replace(ROWS[3], **{part: text}), *ROWS[4:]]

    with pytest.raises(DataError) as refusal:
        prepare(settings(), Loaded(rows), make_tiny_tokenizer())

    assert str(refusal.value).startswith(
        "data.on_control_text: 1 rows have text that becomes a control token"
    )
    assert f"faq.jsonl:4: {message}" in str(refusal.value)
    assert "data.on_control_text=keep" in str(refusal.value)


@pytest.mark.parametrize(("part", "text", "message"), PLANTED)
def test_it_may_be_kept_and_is_counted(part: str, text: str, message: str) -> None:
    rows = [*ROWS[:3], replace(ROWS[3], **{part: text}), *ROWS[4:]]

    splits = prepare(settings("keep"), Loaded(rows), make_tiny_tokenizer())

    assert splits.counts["rows whose text spells a control token (kept)"] == 1


def test_a_system_prompt_that_spells_one_is_refused_by_its_own_key() -> None:
    with pytest.raises(ConfigError, match=r"template.system_prompt: spells <\|im_end\|>"):
        check_control_text(
            settings(system_prompt="Stop at <|im_end|>"), ROWS, make_tiny_tokenizer(), Counter()
        )


def test_only_what_is_special_to_this_tokenizer_counts() -> None:
    rows, tokenizer = [replace(ROWS[0], response="[INST] <s> [/INST]")], make_tiny_tokenizer()
    counts: Counter[str] = Counter()

    check_control_text(settings(), rows, tokenizer, counts)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]"]})

    assert not +counts
    with pytest.raises(DataError, match=r"faq.jsonl:1: the answer spells \[INST\]"):
        check_control_text(settings(), rows, tokenizer, counts)
