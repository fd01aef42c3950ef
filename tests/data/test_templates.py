"""The exact text that a model sees. The templates are the essential part of the models' own."""

import pytest
from transformers import PreTrainedTokenizerFast

from lora_search.data.rows import Pair, Row
from lora_search.data.templates import render
from lora_search.errors import ConfigError
from lora_search.model.tiny import make_tiny_tokenizer
from lora_search.settings.schema import TemplateConfig

ROW = Row("Why?", "", "So.", "faq.jsonl:1")
ROW_WITH_CONTEXT = Row("Why?", "Because.", "So.", "faq.jsonl:2")
LLAMA_31 = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{{- system_message + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REORDERED = "{% for m in messages | reverse %}{{ m['content'] }}\n{% endfor %}"


def tokenizer_with(chat_template: str | None, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.add_special_tokens({**tokens, "additional_special_tokens": ["<|end_header_id|>"]})
    return tokenizer


def test_chatml_teaches_the_end_token_and_leaves_the_prompt_alone() -> None:
    pair = render(ROW_WITH_CONTEXT, TemplateConfig(), make_tiny_tokenizer())

    assert pair.prompt == "<|im_start|>user\nWhy?\n\nBecause.<|im_end|>\n<|im_start|>assistant\n"
    assert pair.completion == "So.<|im_end|>"


def test_a_system_prompt_comes_first() -> None:
    pair = render(ROW, TemplateConfig(system_prompt="Be brief."), make_tiny_tokenizer())

    assert pair.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>")


def test_llama_31_has_one_bos_its_headers_and_a_date_that_never_changes() -> None:
    tokenizer = tokenizer_with(LLAMA_31, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")

    pair = render(ROW, TemplateConfig(system_prompt="Be brief."), tokenizer)

    assert pair == Pair(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "So.<|eot_id|>",
    )


def test_mistral_answers_right_after_the_instruction() -> None:
    tokenizer = tokenizer_with(MISTRAL, bos_token="<s>", eos_token="</s>")

    assert render(ROW, TemplateConfig(), tokenizer) == Pair("<s>[INST] Why? [/INST]", " So.</s>")


def test_a_template_that_refuses_a_system_prompt_is_reported_with_its_words() -> None:
    tokenizer = tokenizer_with(MISTRAL, bos_token="<s>", eos_token="</s>")

    with pytest.raises(ConfigError, match=r"template.system_prompt: .*Only user and assistant roles.*=null"):
        render(ROW, TemplateConfig(system_prompt="Be brief."), tokenizer)


def test_a_template_that_forgets_the_end_token_gets_it() -> None:
    pair = render(ROW, TemplateConfig(), tokenizer_with(NO_END))

    assert pair == Pair("user: Why?\nassistant: ", "So.<|im_end|>")


def test_a_template_in_which_the_answer_does_not_follow_the_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the answer follows the generation prompt.*Use template=inst"):
        render(ROW, TemplateConfig(), tokenizer_with(REORDERED))


def test_a_tokenizer_without_a_template_is_sent_to_inst() -> None:
    with pytest.raises(
        ConfigError, match=r"template.name: needs a tokenizer with a chat template.*template=inst"
    ):
        render(ROW, TemplateConfig(), tokenizer_with(None))


def test_inst_is_the_plain_schema_with_an_end_token() -> None:
    pair = render(ROW_WITH_CONTEXT, TemplateConfig(name="inst"), make_tiny_tokenizer())

    assert pair == Pair("[INST] Why?\n\nBecause. [/INST]", " So.<|im_end|>")


def test_inst_puts_the_system_prompt_before_the_question() -> None:
    template = TemplateConfig(name="inst", system_prompt="Be brief.")

    assert render(ROW, template, make_tiny_tokenizer()).prompt == "[INST] Be brief.\n\nWhy? [/INST]"


def test_inst_writes_bos_for_models_that_start_with_one() -> None:
    tokenizer = tokenizer_with(None, bos_token="<s>", eos_token="</s>")
    tokenizer.add_bos_token = True

    pair = render(ROW, TemplateConfig(name="inst"), tokenizer)

    assert pair == Pair("<s>[INST] Why? [/INST]", " So.</s>")
    assert tokenizer("Why?")["input_ids"][0] == tokenizer.bos_token_id


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = None

    with pytest.raises(ConfigError, match="must have an end token"):
        render(ROW, TemplateConfig(name="inst"), tokenizer)
