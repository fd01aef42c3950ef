"""What is served writes the prompts that were trained, and ends where the training rows end."""

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_search.data.serving import end_tokens, write_serving
from lora_search.data.templates import render
from lora_search.model.tiny import CHATML, make_tiny_tokenizer
from lora_search.reading.rows import Row
from lora_search.settings.schema import TemplateConfig

ROWS = [
    Row("Why?", "", "Because.", "a:1"),
    Row("  Why? ", "As it is:\n\n- so\n", "Be\ncause. ", "a:2"),
    Row("Пример {{ 1 }} {% x %} \\n \"q\" 'q' 🎉", "", "Ja.", "a:3"),
]
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = 'I am the default.' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user {{ system ~ '|' if loop.first }}"
    "{{ m['content'].strip() }}<|im_end|>{% else %}<|im_start|>{{ m['content'] }}<|im_end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SPACED = "\n  {# a comment #}  \n" + CHATML
TEMPLATES = {"chatml": CHATML, "dated": DATED, "default system": LLAMA2, "spaced": SPACED}
SYSTEMS = [None, "", "Be brief.", "SYSTEM BOS EOS", "Say \"Ja\" \\ \n\n{{ messages }} {% if %} 🎉 'x'"]


def served(
    folder: Path, tokenizer: PreTrainedTokenizerBase, template: TemplateConfig
) -> PreTrainedTokenizerBase:
    write_serving(folder, tokenizer, template, {})
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def asked(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Return the prompt's ids as people get them who have nothing but the folder."""
    messages = [{"role": "user", "content": row.question}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def trained(tokenizer: PreTrainedTokenizerBase, template: TemplateConfig, row: Row) -> list[int]:
    ids: list[int] = tokenizer(render(row, template, tokenizer).prompt, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_asks_as_the_rows_were_trained(
    tmp_path: Path, source: str, system: str | None
) -> None:
    tokenizer, template = make_tiny_tokenizer(), TemplateConfig(system_prompt=system)
    tokenizer.chat_template = source

    loaded = served(tmp_path, tokenizer, template)

    for row in ROWS:
        assert asked(loaded, row) == trained(tokenizer, template, row)
    assert tokenizer.chat_template == source


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("has_bos", [True, False])
def test_inst_becomes_a_chat_template(tmp_path: Path, has_bos: bool, system: str | None) -> None:
    tokenizer, template = make_tiny_tokenizer(), TemplateConfig(name="inst", system_prompt=system)
    tokenizer.chat_template = None
    if has_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
        )

    loaded = served(tmp_path, tokenizer, template)

    for row in ROWS:
        assert asked(loaded, row) == trained(tokenizer, template, row)
    pair, answer = render(ROWS[0], template, tokenizer), {"role": "assistant", "content": ROWS[0].response}
    whole = [{"role": "user", "content": ROWS[0].question}, answer]
    assert loaded.apply_chat_template(whole, tokenize=False) == pair.prompt + pair.completion
    assert trained(tokenizer, template, ROWS[0])[0] == tokenizer.bos_token_id or not has_bos


@pytest.mark.parametrize("name", ["chat", "inst"])
def test_a_system_message_takes_the_place_of_the_default(tmp_path: Path, name: str) -> None:
    tokenizer, other = make_tiny_tokenizer(), TemplateConfig(name=name, system_prompt="Be long.")
    loaded = served(tmp_path, tokenizer, TemplateConfig(name=name, system_prompt="Be brief."))
    messages = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Why?"}]

    text = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    assert text == render(ROWS[0], other, tokenizer).prompt
    assert "brief" not in text


@pytest.mark.parametrize(
    ("own", "expected"), [(None, [2, 0]), (1, [2, 0, 1]), ([0, 5], [2, 0, 5]), ([2], [2, 0])]
)
def test_every_token_that_ends_an_answer_is_named(own: int | list[int] | None, expected: list[int]) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # as a base model has it; its template ends with <|im_end|>

    assert end_tokens(TemplateConfig(), tokenizer, {"eos_token_id": own}) == expected


def test_the_generation_config_keeps_the_bases_own_values(tmp_path: Path) -> None:
    base = {"temperature": 0.6, "eos_token_id": 7, "_from_model_config": True}
    write_serving(tmp_path, make_tiny_tokenizer(), TemplateConfig(), base)

    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "temperature": 0.6, "eos_token_id": [2, 7],
    }  # fmt: skip


def test_what_was_written_before_is_replaced(tmp_path: Path) -> None:
    served(tmp_path / "t", make_tiny_tokenizer(), TemplateConfig(system_prompt="Old."))
    served(tmp_path / "t", make_tiny_tokenizer(), TemplateConfig(system_prompt="New."))

    assert "New." in (tmp_path / "t/chat_template.jinja").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
