"""Models that think first: an answer goes on from what the generation prompt opens. The templates are the
essential part of the models' own."""

from collections import Counter

import pytest
from transformers import PreTrainedTokenizerFast

from lora_search.data.conversation_masks import DROPPED
from lora_search.data.rows import Item
from lora_search.data.templates import Renderer
from lora_search.data.thinking import EMPTY
from lora_search.data.tokens import tokenize_rows
from lora_search.errors import ConfigError
from lora_search.model.tiny import make_tiny_tokenizer
from lora_search.reading.conversations import conversation_row
from lora_search.reading.rows import Record, Row
from lora_search.settings.schema import TemplateConfig

R1 = (  # DeepSeek R1 and its distilled models
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% endif %}{% if m['role'] == 'assistant' %}"
    "{% set said = m['content'] %}{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}"
    "{% endif %}<|Assistant|>{{ said }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
QWQ = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NO_BREAK = R1.replace("<think>\n", "<think>")
QWEN3_THINKING = (  # Qwen3-Thinking-2507: the last answer keeps its thinking, or gets an empty block
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}{% set thought = m.reasoning_content or "
    "(parts[0].split('<think>')[-1] if parts | length > 1 else '') %}"
    "{% if loop.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TEMPLATES = {"r1": R1, "qwq": QWQ, "no break": NO_BREAK, "qwen 3": QWEN3_THINKING}
PLAIN, GIVEN = "So it is.", "<think>\nHm, well.\n</think>\n\nSo it is."
USER, MORE = {"role": "user", "content": "Why?"}, {"role": "user", "content": "And when it rains?"}


def tokenizer_with(name: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    special = ["<|User|>", "<|Assistant|>"]
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": special})
    return tokenizer


def tokenized(name: str, row: Row, loss_on: str = "all_assistant_turns") -> tuple[Item, Counter[str]]:
    renderer = Renderer(TemplateConfig(), tokenizer_with(name))
    (item,) = tokenize_rows([row], renderer, loss_on)
    return item, +renderer.counts


def said(name: str, item: Item) -> list[str]:
    tokenizer = tokenizer_with(name)
    return [tokenizer.decode(item.example.input_ids[start:stop]) for start, stop in item.example.learnt]


def question(answer: str) -> Row:
    return Row("Why?", "", answer, "faq.jsonl:1")


def chat(*turns: dict[str, str]) -> Row:
    row = conversation_row(turns, Record("line 1", "chat.jsonl:1", None))
    assert isinstance(row, Row)
    return row


def asked(name: str, *turns: dict[str, str]) -> list[int]:
    """Return what a model is asked with at inference, by plain transformers."""
    ids: list[int] = tokenizer_with(name).apply_chat_template(
        list(turns), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return ids


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", [PLAIN, GIVEN])
def test_the_prompt_is_what_the_model_is_asked_with_and_the_answer_goes_on_from_it(
    name: str, answer: str
) -> None:
    item, _ = tokenized(name, question(answer))

    prompt = asked(name, USER)
    assert list(item.example.input_ids[: len(prompt)]) == prompt
    assert item.example.num_prompt_tokens == len(prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_thinking_of_the_last_answer_is_learnt_as_it_was_given(name: str) -> None:
    item, counts = tokenized(name, question(GIVEN))

    assert (item.pair.prompt + item.pair.completion).endswith(f"{GIVEN}<|im_end|>")
    assert said(name, item)[0].endswith("Hm, well.\n</think>\n\nSo it is.<|im_end|>")
    assert counts[EMPTY] == counts[DROPPED] == 0


@pytest.mark.parametrize("name", ["r1", "qwq", "no break"])
def test_an_answer_without_thinking_closes_the_block_and_is_counted(name: str) -> None:
    item, counts = tokenized(name, question(PLAIN))

    assert (item.pair.prompt + item.pair.completion).endswith("<think>\n\n</think>\n\nSo it is.<|im_end|>")
    assert counts[EMPTY] == 1


def test_thinking_without_its_opening_tag_is_the_same() -> None:
    bare = GIVEN.removeprefix("<think>\n")

    assert tokenized("r1", question(bare))[0].example == tokenized("r1", question(GIVEN))[0].example


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", [PLAIN, GIVEN])
def test_a_chat_of_one_turn_is_the_question_with_its_answer(name: str, answer: str) -> None:
    single = tokenized(name, question(answer))[0]
    turns = chat(USER, {"role": "assistant", "content": answer, "name": "bot"})  # kept as a conversation

    assert turns.messages
    assert tokenized(name, turns)[0].example == single.example


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_in_a_field_of_its_own_is_the_same(name: str) -> None:
    turn = {"role": "assistant", "content": PLAIN, "reasoning_content": "Hm, well."}

    item, counts = tokenized(name, chat(USER, turn))

    assert said(name, item)[0].endswith("Hm, well.\n</think>\n\nSo it is.<|im_end|>")
    assert counts[EMPTY] == counts[DROPPED] == 0


@pytest.mark.parametrize("name", ["r1", "qwq", "no break", "qwen 3"])
def test_earlier_answers_stay_as_the_template_writes_them_and_the_last_goes_on_from_its_prompt(
    name: str,
) -> None:
    answer = {"role": "assistant", "content": GIVEN}

    item, counts = tokenized(name, chat(USER, answer, MORE, answer))

    first, last = said(name, item)
    assert "Hm" not in first
    assert first.lstrip() == "So it is.<|im_end|>"
    assert last.endswith("Hm, well.\n</think>\n\nSo it is.<|im_end|>")
    assert counts == Counter({DROPPED: 1})
    prompt = asked(name, USER, answer, MORE)
    assert list(item.example.input_ids[: len(prompt)]) == prompt
    (only,) = said(name, tokenized(name, chat(USER, answer, MORE, answer), "last_turn")[0])
    assert only == last


def test_a_template_that_changes_the_answer_after_thinking_is_refused() -> None:
    tokenizer = tokenizer_with("r1")
    tokenizer.chat_template = R1.replace("{{ said }}", "{{ said | upper }}")

    with pytest.raises(ConfigError, match=r"changes the answer \(faq.jsonl:1: given: 'So it is.'"):
        Renderer(TemplateConfig(), tokenizer).pair(question("So it is."))
