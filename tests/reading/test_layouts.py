"""Which column is what: recognised where it is unmistakable, else refused with all that is missing."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from lora_search.errors import DataError
from lora_search.reading.load import load_rows
from lora_search.reading.rows import Row
from lora_search.settings.schema import ColumnsConfig, DataConfig

QA = ("What is a roof?", "It covers a house.")
USER, ASSISTANT = {"role": "user", "content": QA[0]}, {"role": "assistant", "content": QA[1]}
CHAT = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Rain."}]  # fmt: skip
LAYOUTS = [  # one row each that says the same, and how it is recognised
    ({"instruction": QA[0], "input": "", "output": QA[1]}, "alpaca: instruction, output, input"),
    (
        {"instruction": QA[0], "context": "", "response": QA[1]},
        "instruction_response: instruction, response, context",
    ),
    ({"instruction": QA[0], "response": QA[1]}, "instruction_response: instruction, response"),
    ({"prompt": QA[0], "completion": QA[1]}, "prompt_completion: prompt, completion"),
    ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion: prompt, completion"),
    ({"messages": [USER, ASSISTANT]}, "messages: messages"),
    ({"messages": json.dumps([USER, ASSISTANT])}, "messages: messages"),
    ({"conversation": [USER, ASSISTANT]}, "messages: conversation"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": QA[0]}]}, ASSISTANT]},
        "messages: messages",
    ),
    (
        {
            "contents": [
                {"role": "user", "parts": [{"text": QA[0]}]},
                {"role": "model", "parts": [{"text": QA[1]}]},
            ]
        },
        "gemini: contents",
    ),
    (
        {"messages": [{"role": "prompter", "content": [QA[0]]}, {"role": "bot", "content": QA[1]}]},
        "messages: messages",
    ),
    (
        {"conversations": [{"from": "human", "value": QA[0]}, {"from": "gpt", "value": QA[1]}]},
        "sharegpt: conversations",
    ),
    ({"question": QA[0], "answer": QA[1]}, "question_answer: question, answer"),
    ({"Question": QA[0], "Answer": QA[1], "id": 3}, "question_answer: Question, Answer"),
    ({"q": QA[0], "a": QA[1]}, "question and answer: q, a"),
    (
        {"query": QA[0], "response": QA[1], "url": "https://example.org/" + "x" * 60},
        "question and answer: query, response",
    ),
    ({"input": QA[0], "output": QA[1]}, "question and answer: input, output"),
    ({"instruction": QA[0], "output": QA[1], "text": f"### {QA[0]}\n{QA[1]}"}, "alpaca: instruction, output"),
]


def write(path: Path, *rows: object, **data: object) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(path=str(path), **data)  # type: ignore[arg-type]


def refusal(config: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(config)
    return str(caught.value)


@pytest.mark.parametrize(("row", "described"), LAYOUTS, ids=range(len(LAYOUTS)))
def test_a_usual_layout_is_recognised_without_any_setting(
    tmp_path: Path, row: object, described: str
) -> None:
    loaded = load_rows(write(tmp_path / "faq.jsonl", row))

    assert loaded.rows == [Row(*QA[:1], "", QA[1], "faq.jsonl:1")]
    assert loaded.notes == (f"faq.jsonl: {described}",)


PACKAGED = ["faq-en.csv", "faq-en.json", "faq-en.jsonl", "faq-en-alpaca.jsonl", "faq-en-sharegpt.jsonl"]


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_pairs_are_the_same_in_all_their_formats(name: str) -> None:
    folder = Path(str(files("zaragoza_construction_faq"))) / "data"
    texts = [
        {(row.question, row.response, row.messages) for row in load_rows(DataConfig(path=str(path))).rows}
        for path in (folder / name, folder / "faq-en-alpaca.jsonl")
    ]

    assert texts[0] == texts[1]
    assert len(texts[0]) == 503


def test_a_conversation_keeps_its_turns_and_its_system_message(tmp_path: Path) -> None:
    (row,) = load_rows(write(tmp_path / "chat.jsonl", {"messages": CHAT})).rows

    assert (row.question, row.response) == (QA[0], "Rain.")
    assert row.turns == CHAT


def test_a_system_column_leads_the_conversation(tmp_path: Path) -> None:
    (row,) = load_rows(write(tmp_path / "faq.jsonl", {"system": "Be brief.", "q": QA[0], "a": QA[1]})).rows

    assert row.turns == CHAT[:3]


def test_tools_and_their_calls_are_read_as_templates_take_them(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "area", "arguments": '{"side": 2}'}}
    tools = [{"type": "function", "function": {"name": "area", "parameters": {"type": "object"}}}]
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "1", "content": "4"}, ASSISTANT]  # fmt: skip

    (row,) = load_rows(write(tmp_path / "chat.jsonl", {"messages": turns, "tools": tools})).rows

    assert row.turns[1]["tool_calls"][0]["function"] == {"name": "area", "arguments": {"side": 2}}
    assert json.loads(row.tools) == tools


def test_a_chat_of_gemini_keeps_its_system_instruction(tmp_path: Path) -> None:
    turns = [{"role": "user", "parts": [{"text": "What is "}, {"text": "a roof?"}]}]
    turns += [{"role": "model", "parts": [{"text": QA[1]}]}]
    row = {"systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]}, "contents": turns}

    loaded = load_rows(write(tmp_path / "vertex.jsonl", row))

    assert loaded.rows[0].turns == CHAT[:3]
    assert loaded.notes == ("vertex.jsonl: gemini: contents, systemInstruction",)


def test_a_call_as_openai_wrote_it_before_tool_calls_is_a_tool_call(tmp_path: Path) -> None:
    call = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "area", "arguments": '{"side": 2}'},
    }
    told = {"role": "function", "name": "area", "content": "4"}

    (row,) = load_rows(write(tmp_path / "chat.jsonl", {"messages": [USER, call, told, ASSISTANT]})).rows

    assert row.turns[1]["tool_calls"][0]["function"] == {"name": "area", "arguments": {"side": 2}}
    assert row.turns[2] == {"role": "tool", "name": "area", "content": "4"}


def test_what_follows_the_last_answer_is_left_out(tmp_path: Path) -> None:
    (row,) = load_rows(write(tmp_path / "chat.jsonl", {"messages": [*CHAT, USER]})).rows

    assert row.turns == CHAT


BAD_CHATS = [
    ([], "no message of the assistant"),
    ([USER], "no message of the assistant to learn from"),
    ([ASSISTANT], "no message is of the user, so the assistant answers nothing"),
    ([ASSISTANT, USER], "no message is of the user"),
    ([ASSISTANT, USER, {**ASSISTANT, "weight": 0}], "all its answers have the weight 0"),
    ([USER, CHAT[0], ASSISTANT], "message 2 is of the system, after one of the user"),
    (
        [USER, {"role": "model", "parts": [{"functionCall": {"name": "area"}}]}],
        "message 2 contains functionCall; only text",
    ),
    ([USER, ASSISTANT, ASSISTANT], "message 3 is of the assistant, after one of the assistant"),
    ([USER, {"role": "tool", "content": "4"}, ASSISTANT], "message 2 is of the tool, after one of the user"),
    (
        [USER, {"role": "narrator", "content": "x"}],
        "message 2 has the role 'narrator'; known are system, user",
    ),
    ([USER, {"content": "x"}], "message 2 has the role None"),
    ([USER, {"role": "assistant", "content": " "}], "message 2 (assistant) is empty"),
    (
        [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT],
        "message 1 contains image_url; only text",
    ),
    ([{"role": "user", "content": {"a": 1}}, ASSISTANT], "message 1 has content of type dict, not text"),
    (
        [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}],
        "message 2 has a tool call without a name",
    ),
    (["hello", ASSISTANT], "message 1 is str, not an object"),
    ([USER, {**ASSISTANT, "weight": 0.5}], "message 2 has the weight 0.5, not 0 or 1"),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("turns", "message"), BAD_CHATS, ids=range(len(BAD_CHATS)))
def test_a_broken_conversation_is_refused_with_its_line(tmp_path: Path, turns: object, message: str) -> None:
    told = refusal(write(tmp_path / "chat.jsonl", {"messages": CHAT}, {"messages": turns}))

    assert "1 of 2 rows cannot be used" in told
    assert "line 2 of chat.jsonl" in told
    assert message in told


UNKNOWN = [
    ({"frage": QA[0], "antwort": QA[1]}, "instruction=frage data.columns.response=antwort."),
    ({"antwort": QA[1], "frage": QA[0]}, "instruction=frage data.columns.response=antwort."),
    ({"questions": QA[0], "answers": QA[1]}, "instruction=questions data.columns.response=answers."),
    ({"question": QA[0], "svar": QA[1]}, "no answer that could be recognised (columns: question, svar)"),
    (
        {"context": "Text.", "question": QA[0], "answers": [QA[1]]},
        '"answers" is a list, not text. Write one text',
    ),
    (
        {"context": "Text.", "question": QA[0], "answers": {"text": [QA[1]]}},
        '"answers" is an object, not text.',
    ),
    ({"context": "Text.", "question": QA[0], "score": 1}, "Set data.columns.response=NAME."),
    ({"question": QA[0], "svar": QA[1]}, "Set data.columns.response=svar."),
    ({"id": "1", "svar": QA[1], "answer": "yes"}, "Set data.columns.instruction=id"),
    ({"n": 1}, "Set data.columns.instruction=NAME data.columns.response=NAME."),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("row", "proposal"), UNKNOWN, ids=range(len(UNKNOWN)))
def test_all_that_is_missing_is_named_at_once_with_a_proposal(
    tmp_path: Path, row: object, proposal: str
) -> None:
    assert proposal in refusal(write(tmp_path / "faq.jsonl", row))


def test_what_is_proposed_works(tmp_path: Path) -> None:
    config = write(tmp_path / "faq.jsonl", {"frage": QA[0], "antwort": QA[1]})
    config.columns = ColumnsConfig(instruction="frage", response="antwort")

    assert load_rows(config).rows == [Row(QA[0], "", QA[1], "faq.jsonl:1")]


def test_a_file_without_column_names_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "faq.csv"
    path.write_text("What is a roof?;It covers a house.\nWhat is a wall?;It carries the roof.\n")

    assert "faq.csv does not name its columns in its first line (What is a roof?; It covers" in refusal(
        DataConfig(path=str(path))
    )


@pytest.mark.parametrize(
    ("extra", "remedy"),
    [
        ({"input": "A Swedish text."}, "data.columns.context=input"),
        ({"system_prompt": "Be brief."}, "data.columns.system=system_prompt"),
        ({"reasoning": "Think."}, "data.columns.ignore=[reasoning]"),
        ({"history": [["a", "b"]]}, "data.columns.ignore=[history]"),
        (
            {"bakgrund": "En mycket lång text som modellen borde ha sett innan den svarar på frågan."},
            "[bakgrund]",
        ),
    ],
)
def test_text_that_nothing_uses_is_refused_with_the_remedy(
    tmp_path: Path, extra: dict[str, object], remedy: str
) -> None:
    told = refusal(write(tmp_path / "faq.jsonl", {"question": QA[0], "answer": QA[1], **extra}))

    assert "faq.jsonl has text that is not used" in told
    assert remedy in told


def test_text_may_be_left_out_on_purpose(tmp_path: Path) -> None:
    row = {"question": QA[0], "answer": QA[1], "input": "Text.", "reasoning": "Think."}
    config = write(tmp_path / "faq.jsonl", row)
    config.columns = ColumnsConfig(context=None, ignore=["reasoning"])

    assert load_rows(config).rows == [Row(QA[0], "", QA[1], "faq.jsonl:1")]


def test_labels_are_no_text_that_must_be_used(tmp_path: Path) -> None:
    row = {"question": QA[0], "answer": QA[1], "id": "x", "category": "roof", "sources": ["a", "b"], "n": 4}

    assert len(load_rows(write(tmp_path / "faq.jsonl", row)).rows) == 1


def test_a_format_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path / "faq.jsonl", {"question": QA[0], "answer": QA[1]}, format="alpaca")

    assert (
        "data.format: alpaca needs the columns instruction, output (there are: question, answer)"
        in refusal(config)
    )


def test_a_format_chooses_among_several_layouts(tmp_path: Path) -> None:
    row = {"prompt": "P?", "completion": "C.", "question": "P?", "answer": "C."}

    loaded = load_rows(write(tmp_path / "faq.jsonl", row, format="question_answer"))

    assert loaded.notes == ("faq.jsonl: question_answer: question, answer",)


def test_input_is_no_question_where_another_column_may_be_one(tmp_path: Path) -> None:
    rows = [
        {"fråga": f"Hur gör man {i}?", "svar": f"Så här, och sedan så {i}.", "input": f"Nummer {i}"}
        for i in range(9)
    ]

    message = refusal(write(tmp_path / "se.jsonl", *rows))

    assert "no question and no answer" in message
    assert "data.columns.instruction=fråga data.columns.response=svar" in message


def test_input_is_no_question_where_only_the_answer_is_named(tmp_path: Path) -> None:
    row = {"fråga": "Hur?", "svar": "Så här, och sedan så.", "input": "Nummer ett"}

    message = refusal(write(tmp_path / "se.jsonl", row, columns=ColumnsConfig(response="svar")))

    assert "no question" in message
    assert "data.columns.instruction=fråga" in message


def test_the_answer_may_be_named_where_the_question_is_plain(tmp_path: Path) -> None:
    row = {"instruction": QA[0], "input": "", "output": QA[1]}
    config = write(tmp_path / "a.jsonl", row, columns=ColumnsConfig(response="output"))

    assert load_rows(config).rows == [Row(QA[0], "", QA[1], "a.jsonl:1")]
