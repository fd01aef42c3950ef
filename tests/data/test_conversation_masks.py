"""Conversations in tokens: plain transformers' ids, and a loss on just what the assistant says."""

from collections import Counter
from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from lora_search.data.conversation_masks import DROPPED
from lora_search.data.rows import Example, Pair
from lora_search.data.templates import Renderer
from lora_search.data.tokens import cut, cut_pair, tokenize_rows
from lora_search.errors import ConfigError
from lora_search.model.tiny import CHATML, make_tiny_tokenizer
from lora_search.reading.conversations import conversation_row
from lora_search.reading.rows import Record, Row
from lora_search.settings.schema import TemplateConfig
from tests.data.test_templates import LLAMA_31, MISTRAL

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ first if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'tool' %}<|Tool|>{{ m['content'] }}"
    "{% else %}{% set said = m['content'] %}{% if '</think>' in said %}"
    "{% set said = said.split('</think>')[-1] %}"
    "{% endif %}<|Assistant|>{{ said }}{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
QWEN3 = (  # thinking stays in the last answer only, which gets an empty one where it has none
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1] if parts | length > 1 else '' %}"
    "{% if loop.last %}<think>\n{{ thought.strip() }}\n</think>\n\n{% endif %}{{ parts[-1].strip() }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = "{% for c in message.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
OFFERED = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
TOOLS = OFFERED + CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}" + CALLS)
MARKED = CHATML.replace(
    "{{ message['content'] }}<|im_end|>\n",
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}",
)
LAST_SYSTEM = (  # as Mistral's: the system message goes into the last question
    "{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set messages = messages[1:] if system else messages %}{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ system if loop.revindex <= 2 and loop.last or not loop.last and "
    "loop.index0 >= messages | length - 2 else '' }}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "llama 3.1": LLAMA_31, "chatml": CHATML, "gemma": GEMMA, "mistral": MISTRAL, "r1": R1, "qwen 3": QWEN3,
    "with tools": TOOLS, "with generation markers": MARKED, "system in the last question": LAST_SYSTEM,
}  # fmt: skip
ENDS = {
    "llama 3.1": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "r1": "<|end|>",
    "system in the last question": "</s>",
}
NO_SYSTEM = ("mistral",)

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}
MORE = [
    {"role": "user", "content": "And when it rains?"},
    {"role": "assistant", "content": "Then too. Always."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {
    "many turns": [USER, ANSWER, *MORE, *MORE],
    "system": [SYSTEM, USER, ANSWER, *MORE],
    "system, one turn": [SYSTEM, USER, ANSWER],
}


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    end = ENDS.get(name, "<|im_end|>")
    special = [
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<start_of_turn>",
        "<|User|>",
        "<|Assistant|>",
        "<|Tool|>",
    ]
    tokenizer.add_special_tokens({"eos_token": end, "bos_token": "<s>", "additional_special_tokens": special})
    return tokenizer


def row_of(turns: Sequence[object], tools: object = None) -> Row:
    row = conversation_row(turns, Record("line 1", "chat.jsonl:1", None), tools=tools)
    assert isinstance(row, Row)
    return row


def tokenized(
    name: str, turns: Sequence[object], loss_on: str = "all_assistant_turns", tools: object = None
) -> Example:
    renderer = Renderer(TemplateConfig(), tokenizer_for(name))
    return next(tokenize_rows([row_of(turns, tools)], renderer, loss_on)).example


def said(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(example.input_ids[start:stop]) for start, stop in example.learnt]


CASES = [(name, chat) for name in TEMPLATES for chat in CHATS if not ("system" in chat and name in NO_SYSTEM)]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_tokens_are_those_of_plain_transformers(name: str, chat: str) -> None:
    tokenizer, turns = tokenizer_for(name), CHATS[chat]
    kept = [dict(turn) for turn in turns]
    expected = tokenizer(
        Renderer(TemplateConfig(), tokenizer)._apply(kept, add_generation_prompt=False).rstrip("\n"),
        add_special_tokens=False,
    )["input_ids"]

    assert list(tokenized(name, turns).input_ids) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_rendered_at_once_are_rendered_as_each_by_itself(name: str) -> None:
    renderer = Renderer(TemplateConfig(), tokenizer_for(name))
    rows = [Row(f"Why {i}?", "", f"{{}} So it is.\n  åäö {i}", f"rows:{i}") for i in range(4)]

    assert renderer.pairs(rows) == [renderer.pair(row) for row in rows]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_the_loss_is_on_every_answer_and_its_end_token_and_nothing_else(name: str, chat: str) -> None:
    tokenizer, turns = tokenizer_for(name), CHATS[chat]
    end = ENDS.get(name, "<|im_end|>")
    lead = " " if name in ("mistral", "system in the last question") else ""
    answers = [f"{lead}{turn['content']}{end}" for turn in turns if turn["role"] == "assistant"]
    if name == "qwen 3":
        answers[-1] = f"<think>\n\n</think>\n\n{answers[-1]}"

    assert said(tokenized(name, turns), tokenizer) == answers
    assert said(tokenized(name, turns, "last_turn"), tokenizer) == answers[-1:]


@pytest.mark.parametrize(
    "name", [name for name in TEMPLATES if name not in ("qwen 3", "system in the last question")]
)
def test_each_answer_begins_where_the_question_before_it_leaves_off(name: str) -> None:
    tokenizer, turns = tokenizer_for(name), CHATS["many turns"]
    renderer = Renderer(TemplateConfig(), tokenizer)
    asked = [renderer._apply(turns[:i], add_generation_prompt=True) for i in (1, 3, 5)]

    example = tokenized(name, turns)

    assert [start for start, _ in example.learnt] == [
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in asked
    ]


@pytest.mark.parametrize("chat", CHATS)
def test_the_loss_is_where_generation_markers_say(chat: str) -> None:
    tokenizer, turns = tokenizer_for("with generation markers"), CHATS[chat]
    told = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)

    example = tokenized("with generation markers", turns)

    ours = [any(a <= i < b for a, b in example.learnt) for i in range(len(example.input_ids))]
    assert ours == [bool(flag) for flag in told["assistant_masks"]][: len(ours)]
    assert not any(told["assistant_masks"][len(ours) :])


GREETING = {"role": "assistant", "content": "Hello, ask me."}
UNUSUAL = {
    "greeting": [GREETING, USER, ANSWER, *MORE],
    "system, greeting": [SYSTEM, GREETING, USER, ANSWER],
    "two questions": [USER, MORE[0], ANSWER, USER, USER, MORE[1]],
    "empty system": [{"role": "system", "content": ""}, USER, ANSWER, *MORE],
}
FREE = ("llama 3.1", "chatml", "r1", "with generation markers")  # templates that render turns in any order


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("chat", UNUSUAL)
def test_turns_in_an_unusual_order_are_learnt_as_the_template_renders_them(name: str, chat: str) -> None:
    tokenizer, turns = tokenizer_for(name), UNUSUAL[chat]
    renderer = Renderer(TemplateConfig(), tokenizer)
    expected = tokenizer(
        renderer._apply(turns, add_generation_prompt=False).rstrip("\n"), add_special_tokens=False
    )["input_ids"]

    example = tokenized(name, turns)

    assert list(example.input_ids) == expected
    end, first = ENDS.get(name, "<|im_end|>"), turns.index(USER)
    answers = [turn["content"] for turn in turns[first:] if turn["role"] == "assistant"]
    assert said(example, tokenizer) == [f"{answer}{end}" for answer in answers]


def test_a_greeting_and_an_empty_system_message_are_counted() -> None:
    renderer = Renderer(TemplateConfig(), tokenizer_for("chatml"))

    list(tokenize_rows([row_of(UNUSUAL["greeting"]), row_of(UNUSUAL["empty system"])], renderer))

    assert set(+renderer.counts) == {
        "messages of the assistant before the first question: read, not learnt",
        "empty system messages, rendered as given",
    }


ALTERNATING = (  # as Mistral's and Gemma's own templates
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("chat", ["greeting", "two questions"])
def test_turns_in_an_order_that_a_template_refuses_are_refused_with_their_row(chat: str) -> None:
    tokenizer = tokenizer_for("gemma")
    tokenizer.chat_template = ALTERNATING + GEMMA

    with pytest.raises(
        ConfigError, match=r"conversation: Conversation roles must alternate \(chat.jsonl:1\)"
    ):
        next(tokenize_rows([row_of(UNUSUAL[chat])], Renderer(TemplateConfig(), tokenizer)))


def test_rows_that_a_template_refuses_can_be_left_out_and_are_counted_once() -> None:
    tokenizer = tokenizer_for("gemma")
    tokenizer.chat_template = ALTERNATING + GEMMA
    renderer, good, bad = (
        Renderer(TemplateConfig(), tokenizer),
        row_of([USER, ANSWER]),
        row_of(UNUSUAL["greeting"]),
    )
    rows = [good, bad, good, good, Row("Why?", "", "So.", "chat.jsonl:9"), bad, good]

    items = list(tokenize_rows(rows, renderer, skip=True))

    assert [item.source for item in items] == [row.source for row in rows if row is not bad]
    assert +renderer.counts == {"rows that the template refuses (left out)": 2}
    assert [item.example for item in items] == [
        item.example for row in rows if row is not bad for item in tokenize_rows([row], renderer)
    ]


def test_a_template_that_refuses_every_row_is_one_message_even_when_rows_may_be_skipped() -> None:
    tokenizer = tokenizer_for("gemma")
    tokenizer.chat_template = ALTERNATING + GEMMA
    rows = [row_of(UNUSUAL["greeting"]), row_of(UNUSUAL["two questions"])]

    with pytest.raises(ConfigError, match=r"alternate \(chat.jsonl:1\), as all of 2 rows"):
        list(tokenize_rows(rows, Renderer(TemplateConfig(), tokenizer), skip=True))


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "area", "arguments": '{"side": 2}'}}]}
TOOL_TURNS = [USER, CALL, {"role": "tool", "content": "4"}, ANSWER]
OFFER = [
    {"type": "function", "function": {"name": "area", "parameters": {"type": "object", "properties": {}}}}
]


def test_tool_calls_are_learnt_and_their_results_are_not() -> None:
    tokenizer = tokenizer_for("with tools")

    example = tokenized("with tools", TOOL_TURNS, tools=OFFER)

    first, last = said(example, tokenizer)
    assert first.startswith("<tool_call>")
    assert '"arguments": {"side": 2}' in first
    assert last == "So it is.<|im_end|>"
    assert '"parameters"' in tokenizer.decode(example.input_ids[: example.num_prompt_tokens])


def test_tool_calls_in_a_template_that_writes_them_otherwise() -> None:
    example = tokenized("r1", TOOL_TURNS)

    assert said(example, tokenizer_for("r1")) == ['<|call|>area{"side": 2}<|end|>', "So it is.<|end|>"]


def test_an_answer_of_weight_0_is_read_and_not_learnt() -> None:
    turns = [USER, {**ANSWER, "weight": 0}, *MORE]

    assert said(tokenized("chatml", turns), tokenizer_for("chatml")) == ["Then too. Always.<|im_end|>"]


THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo it is."}


@pytest.mark.parametrize(
    ("name", "dropped", "answers"),
    [
        ("chatml", 0, ["<think>\nHm.\n</think>\n\nSo it is.<|im_end|>", "Then too. Always.<|im_end|>"]),
        ("r1", 1, ["\n\nSo it is.<|end|>", "Then too. Always.<|end|>"]),
        ("qwen 3", 1, ["So it is.<|im_end|>", "<think>\n\n</think>\n\nThen too. Always.<|im_end|>"]),
    ],
)
def test_thinking_is_kept_or_left_out_by_the_template_and_counted(
    name: str, dropped: int, answers: list[str]
) -> None:
    renderer = Renderer(TemplateConfig(), tokenizer_for(name))

    (item,) = tokenize_rows([row_of([USER, THOUGHT, *MORE])], renderer)

    assert said(item.example, renderer.tokenizer) == answers
    assert renderer.counts == Counter({DROPPED: dropped} if dropped else {})


def test_inst_writes_conversations_as_it_writes_questions() -> None:
    renderer = Renderer(TemplateConfig(name="inst", system_prompt="Be brief."), make_tiny_tokenizer())

    (item,) = tokenize_rows([row_of([USER, ANSWER, *MORE])], renderer)

    assert item.pair.prompt == "[INST] Be brief.\n\nWhy? [/INST]"
    assert said(item.example, renderer.tokenizer) == [" So it is.<|im_end|>", " Then too. Always.<|im_end|>"]


def test_a_conversation_keeps_its_own_system_prompt_and_its_order() -> None:
    renderer = Renderer(TemplateConfig(system_prompt="Be long."), make_tiny_tokenizer())

    (item,) = tokenize_rows([row_of([SYSTEM, USER, ANSWER, *MORE])], renderer)

    seen = renderer.tokenizer.decode(list(item.example.input_ids))
    turns = [turn["content"] for turn in (SYSTEM, USER, ANSWER, *MORE)]
    places = [seen.find(turn) for turn in turns]
    assert "Be long." not in seen
    assert places == sorted(places)
    assert min(places) >= 0


def test_a_template_that_refuses_a_conversation_is_one_message_with_the_row() -> None:
    with pytest.raises(ConfigError, match=r"refuses the conversation: Only user and .*\(chat.jsonl:1\)"):
        tokenized("mistral", [SYSTEM, USER, ANSWER])


def test_a_template_that_loses_a_message_is_refused() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages[-2:] %}"
    )

    with pytest.raises(ConfigError, match=r"loses or changes a message of the user \(chat.jsonl:1: 'Why\?'"):
        next(tokenize_rows([row_of([USER, ANSWER, *MORE])], Renderer(TemplateConfig(), tokenizer)))


def shortened(max_length: int) -> tuple[Example, Pair, PreTrainedTokenizerFast]:
    tokenizer = tokenizer_for("chatml")
    (item,) = tokenize_rows([row_of(CHATS["many turns"])], Renderer(TemplateConfig(), tokenizer))
    return cut(item.example, max_length), cut_pair(item, max_length, tokenizer), tokenizer


@pytest.mark.parametrize("max_length", range(40, 160, 7))
def test_a_long_conversation_is_cut_at_the_end_of_a_turn(max_length: int) -> None:
    example, pair, tokenizer = shortened(max_length)

    assert len(example.input_ids) <= max_length
    assert said(example, tokenizer) == [
        "So it is.<|im_end|>",
        *["Then too. Always.<|im_end|>"] * (len(example.learnt) - 1),
    ]
    assert tokenizer.decode(example.input_ids) == pair.prompt + pair.completion


def test_the_text_says_what_bears_no_loss() -> None:
    _, pair, _ = shortened(512)

    parts = [pair.completion[start:stop] for start, stop in pair.masked]
    assert parts == ["\n<|im_start|>user\nAnd when it rains?<|im_end|>\n<|im_start|>assistant\n"] * 2


@pytest.mark.parametrize(
    ("turns", "tools", "what"),
    [(TOOL_TURNS, None, "the tool calls"), ([USER, ANSWER], OFFER, "the tools on offer")],
)
def test_a_template_that_knows_no_tools_is_refused_where_rows_hold_them(
    turns: list[object], tools: object, what: str
) -> None:
    with pytest.raises(ConfigError, match=rf"template leaves out {what} \(chat.jsonl:1: 'area'\)"):
        tokenized("chatml", turns, tools=tools)
