"""The exact text that a model sees. The templates are the essential part of the models' own."""

import pytest
from transformers import PreTrainedTokenizerFast

from lora_search.data.rows import Pair
from lora_search.data.templates import Renderer, render
from lora_search.errors import ConfigError
from lora_search.model.tiny import CHATML, make_tiny_tokenizer
from lora_search.reading.rows import Row
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


USER_AND_ASSISTANT_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n"
    "{% elif m['role'] == 'assistant' %}A: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
THINKING = (  # as Qwen3 and SmolLM3 write it where no thinking is given
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CUT_THINKING = CHATML.replace(  # as DeepSeek R1 does
    "{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}"
)
SYSTEM_IN_USER = (  # as Gemma's variants and Mistral write it
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ system + m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def changed(expression: str, role: str = "") -> str:
    """Return ChatML with what it makes of a content, of messages of one role or of all."""
    branch = "{{ message['content'] }}"
    if role:
        branch = (
            f"{{% if message['role'] == '{role}' %}}{{{{ {expression} }}}}{{% else %}}{branch}{{% endif %}}"
        )
        return CHATML.replace("{{ message['content'] }}", branch)
    return CHATML.replace(branch, f"{{{{ {expression} }}}}")


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


@pytest.mark.parametrize(
    ("template", "key", "message"),
    [
        (
            USER_AND_ASSISTANT_ONLY,
            "template.system_prompt",
            "leaves the system message out .* got 'Be brief.'",
        ),
        (changed("''", "system"), "template.system_prompt", "leaves the system message out"),
        (changed("''", "user"), "template.name", "leaves the user message out"),
        (changed("''", "assistant"), "template.name", "leaves the answer out"),
        (
            changed("message['content'] | lower"),
            "template.system_prompt",
            r"changes the system message \(faq.jsonl:1: given: .*system\\nBe brief.*would see: .*system\\nbe",
        ),
        (
            changed("message['content'] | lower", "user"),
            "template.name",
            "changes the user message .*Why.*why",
        ),
        (
            changed("message['content'] | lower", "assistant"),
            "template.name",
            "changes the answer .*'So.*'so",
        ),
        (changed("message['content'] | title", "system"), "template.system_prompt", "Be brief.*Be Brief"),
        (
            changed("message['content'][:2]", "user"),
            "template.name",
            "leaves the user message out .*h<|im_end",
        ),
        (changed("message['content'][1:]", "assistant"), "template.name", "leaves the answer out .*o."),
        (changed("message['content'] | replace('y', 'i')", "user"), "template.name", "Why.*Whi"),
        (changed("message['content'] | reverse", "assistant"), "template.name", "the answer out .*.oS"),
        (
            REORDERED,
            "template.name",
            "the answer follows the generation prompt.*when asked: .*when answered: ",
        ),
    ],
)
def test_a_template_that_loses_or_changes_a_text_is_refused_with_the_difference(
    template: str, key: str, message: str
) -> None:
    settings = TemplateConfig(system_prompt="Be brief.")

    with pytest.raises(ConfigError, match=f"{key}: .*{message}"):
        render(ROW, settings, tokenizer_with(template))


HTML = Row("Is 1 < 2 & 2 > 1?", "", "Yes: <b>1 < 2</b>", "faq.jsonl:7")


@pytest.mark.wrong_input
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_escapes_html_is_refused_at_the_row_that_it_changes(role: str) -> None:
    tokenizer = tokenizer_with(changed("message['content'] | e", role))

    assert render(ROW, TemplateConfig(), tokenizer) == render(ROW, TemplateConfig(), make_tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"template.name: .*faq.jsonl:7: given: .* < .*see: .* &lt; "):
        render(HTML, TemplateConfig(), tokenizer)


def test_a_text_that_a_template_happens_to_write_itself_does_not_pass_for_the_one_it_drops() -> None:
    row = Row("Say A.", "", "A", "faq.jsonl:1")
    template = USER_AND_ASSISTANT_ONLY.replace("A: {{ m['content'] }}", "A: ")

    with pytest.raises(ConfigError, match="leaves the answer out"):
        render(row, TemplateConfig(), tokenizer_with(template))
    with pytest.raises(ConfigError, match="leaves the system message out"):
        render(row, TemplateConfig(system_prompt="Say"), tokenizer_with(USER_AND_ASSISTANT_ONLY))


def test_an_answer_keeps_the_white_space_that_the_template_trims_and_it_is_counted() -> None:
    tokenizer = tokenizer_with(LLAMA_31, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    renderer = Renderer(TemplateConfig(), tokenizer)

    pair = renderer.pair(Row("Why?", "", "    def f():\n        pass\n", "faq.jsonl:1"))

    assert pair.completion == "    def f():\n        pass\n<|eot_id|>"
    assert renderer.counts == {"answers that keep the outer white space that the template trims": 1}


@pytest.mark.parametrize("answer", ["  So.", "So.\n\n", "\n  So.  "])
@pytest.mark.parametrize("template", [None, NO_END, LLAMA_31, CHATML, THINKING])
def test_an_answer_is_in_the_completion_as_given(answer: str, template: str | None) -> None:
    settings = TemplateConfig(name="chat" if template else "inst")

    pair = render(Row("Why?", "", answer, "a"), settings, tokenizer_with(template, bos_token="<s>"))

    assert f"{answer}<|" in pair.completion


def test_a_question_is_trimmed_as_at_inference_and_counted() -> None:
    tokenizer = tokenizer_with(LLAMA_31, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    renderer = Renderer(TemplateConfig(system_prompt="Be brief.\n"), tokenizer)

    pair = renderer.pair(Row("  Why?\n", "", "So.", "faq.jsonl:1"))

    chat = [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "  Why?\n"}]
    asked = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
    )
    assert pair.prompt == asked
    assert renderer.counts == {
        "system texts whose outer white space the template trims": 1,
        "user texts whose outer white space the template trims": 1,
    }


def test_a_system_prompt_within_the_question_is_as_good() -> None:
    tokenizer = tokenizer_with(SYSTEM_IN_USER, bos_token="<s>", eos_token="</s>")

    pair = render(ROW, TemplateConfig(system_prompt="Be brief."), tokenizer)

    assert pair == Pair("<s>[INST] Be brief.\n\nWhy? [/INST]", "So.</s>")


def test_what_a_template_inserts_before_answers_is_counted() -> None:
    renderer = Renderer(TemplateConfig(), tokenizer_with(THINKING))

    plain, thought = renderer.pair(ROW), renderer.pair(Row("Why?", "", "<think>Hm.</think>So.", "b"))

    assert plain.completion == "<think>\n\n</think>\n\nSo.<|im_end|>"
    assert thought.completion == "<think>Hm.</think>So.<|im_end|>"
    inserted = r"answers that follow '<think>\n\n</think>\n\n', which the template inserts"
    assert renderer.counts == {inserted: 1}


def test_a_template_that_cuts_the_thinking_out_of_an_answer_is_refused() -> None:
    row = Row("Why?", "", "<think>Hm.</think>So.", "faq.jsonl:3")

    with pytest.raises(ConfigError, match=r"changes the answer \(faq.jsonl:3: given: '<think>Hm.*see: 'So"):
        render(row, TemplateConfig(), tokenizer_with(CUT_THINKING))


@pytest.mark.wrong_input
@pytest.mark.parametrize("template", ["{{ 'a' + 1 }}", "{% for", "{{ nothing.at.all }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_one_message(template: str) -> None:
    with pytest.raises(ConfigError, match="template.name: the model's template refuses: "):
        render(ROW, TemplateConfig(), tokenizer_with(template))
