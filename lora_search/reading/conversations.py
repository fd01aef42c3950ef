"""Converts a list of messages, with tool calls, to one row with the roles that chat templates use.

Reads OpenAI's role/content, ShareGPT's from/value, Gemini's role/parts, tool calls with JSON text. Any order
of turns that some templates render is kept: the template decides when the row is rendered.
"""

import json
from collections.abc import Sequence
from typing import Any

from lora_search.reading.rows import Complaint, Record, Row

ROLES = {
    "user": "user", "human": "user", "system": "system", "developer": "system", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "ai": "assistant", "chatbot": "assistant", "prompter": "user",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_call": "function_call", "tool_call": "function_call",
}  # fmt: skip
KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "weight")
PART_TYPES = (None, "text", "input_text", "output_text")  # of text; Gemini's parts have no type
MAY_FOLLOW = {  # role -> roles that may follow; no template renders other orders as one would expect
    "": ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant", "user"),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant", "user"),
}

Turn = dict[str, Any]


class _BrokenTurnError(Exception):
    """A message cannot be used; the arguments are the reason and the rest of the sentence."""


def conversation_row(
    messages: Sequence[object], record: Record, *, system: object = None, tools: object = None
) -> Row | Complaint:
    """Return the row of a conversation, or why it cannot be used. Drops messages after the last answer."""
    try:
        turns = [_turn(message, number) for number, message in enumerate(messages, start=1)]
        said = text_of(system, "its system message")
        if said and (not turns or turns[0]["role"] != "system"):
            turns.insert(0, {"role": "system", "content": said})
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        if not turns:
            return Complaint("no answer", f"{record.place} has no message of the assistant to learn from.")
        _check_order(turns)
        _check_learnable(turns)
        offered = _tools(tools)
    except _BrokenTurnError as error:
        reason, rule = error.args
        return Complaint(reason, f"{record.place}: {rule}")
    first = next(turn["content"] for turn in turns if turn["role"] == "user")
    last = turns[-1]["content"]
    is_plain = [turn["role"] for turn in turns] == ["user", "assistant"] and not offered
    if is_plain and all(set(turn) == {"role", "content"} for turn in turns):
        return Row(first, "", last, record.source)
    text = json.dumps(turns, ensure_ascii=False)
    return Row(first, "", last, record.source, messages=text, tools=offered)


def _turn(message: object, number: int) -> Turn:
    if not isinstance(message, dict):
        raise _BrokenTurnError("wrong type", f"message {number} is {type(message).__name__}, not an object.")
    said = message.get("role", message.get("from"))
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        known = "system, user, assistant, tool"
        raise _BrokenTurnError("unknown role", f"message {number} has the role {said!r}; known are {known}.")
    given = next((message[key] for key in ("content", "value", "parts") if key in message), None)
    content = text_of(given, f"message {number}")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(content, number)]}
    turn: Turn = {"role": role, "content": content}
    turn |= {key: message[key] for key in KEPT if message.get(key) not in (None, [], "")}
    if turn.get("weight") not in (None, 0, 1, 0.0, 1.0):
        raise _BrokenTurnError(
            "wrong type", f"message {number} has the weight {turn['weight']!r}, not 0 or 1."
        )
    if turn.get("weight") == 1:
        del turn["weight"]
    if "tool_calls" in turn:
        turn["tool_calls"] = _calls(turn["tool_calls"], number)
    elif message.get("function_call"):  # as OpenAI wrote it before tool_calls
        turn["tool_calls"] = [_call(message["function_call"], number)]
    if not turn["content"].strip() and "tool_calls" not in turn and role not in ("tool", "system"):
        raise _BrokenTurnError("empty field", f"message {number} ({role}) is empty.")
    return turn


def text_of(content: object, what: str) -> str:
    """Return the text of a message; joins text parts and refuses pictures."""
    if content is None:
        return ""
    if isinstance(content, dict):  # Gemini's systemInstruction
        content = content.get("parts", content)
    if isinstance(content, list):
        others = sorted({_kind(part) for part in content if not _is_text(part)})
        if others:
            rule = f"{what} contains {', '.join(others)}; only text can be trained on."
            raise _BrokenTurnError("wrong type", rule)
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    if not isinstance(content, str):
        kind = type(content).__name__
        raise _BrokenTurnError("wrong type", f"{what} has content of type {kind}, not text.")
    try:
        content.encode()
    except UnicodeEncodeError:
        rule = f"{what} contains half a character (a lone surrogate)."
        raise _BrokenTurnError("broken text", rule) from None
    return content


def _is_text(part: object) -> bool:
    if isinstance(part, dict):
        return isinstance(part.get("text"), str) and part.get("type") in PART_TYPES
    return isinstance(part, str)


def _kind(part: object) -> str:
    """Return what a part of a message is: its type, or the key of its content (functionCall, inlineData)."""
    if not isinstance(part, dict):
        return type(part).__name__
    return str(part.get("type") or next((key for key, value in part.items() if value is not None), "nothing"))


def _calls(calls: object, number: int) -> list[Turn]:
    """Return tool calls with arguments as an object, as templates expect them; OpenAI stores JSON text."""
    if not isinstance(calls, list):
        raise _BrokenTurnError("wrong type", f"message {number} has tool_calls that are not a list.")
    return [_call(call, number) for call in calls]


def _call(call: object, number: int) -> Turn:
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except ValueError:
            call = None
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _BrokenTurnError("wrong type", f"message {number} has a tool call without a name.")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise _BrokenTurnError(
                "wrong type", f"message {number} calls {function['name']} with arguments that are not JSON."
            ) from None
    if isinstance(arguments, dict):  # Arrow adds null for the keys of other calls
        arguments = {key: value for key, value in arguments.items() if value is not None}
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    identity = call.get("id") if isinstance(call, dict) else None
    return {"id": identity, **made} if identity else made


def _tools(tools: object) -> str:
    """Return the available tools as JSON, or ""."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise _BrokenTurnError("wrong type", "its tools are not JSON.") from None
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _BrokenTurnError("wrong type", "its tools are not a list of objects.")
    return json.dumps([_without_nulls(tool) for tool in tools], ensure_ascii=False)


def _without_nulls(value: Any) -> Any:
    """Return a tool's schema without the nulls that Arrow adds for the keys of other rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    return [_without_nulls(child) for child in value] if isinstance(value, list) else value


def _check_learnable(turns: Sequence[Turn]) -> None:
    roles = [turn["role"] for turn in turns]
    if "user" not in roles:
        raise _BrokenTurnError("no question", "no message is of the user, so the assistant answers nothing.")
    answers = [turn for turn in turns[roles.index("user") :] if turn["role"] == "assistant"]
    if not any(turn.get("weight", 1) for turn in answers):
        raise _BrokenTurnError(
            "no answer", "all its answers have the weight 0, so none is left to learn from."
        )


def _check_order(turns: Sequence[Turn]) -> None:
    before = ""
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if role not in MAY_FOLLOW[before]:
            who = {"": "the beginning", "call": "a tool call"}.get(before, f"one of the {before}")
            rule = f"message {number} is of the {role}, after {who}."
            raise _BrokenTurnError("order of turns", rule)
        before = "call" if turn.get("tool_calls") else role
