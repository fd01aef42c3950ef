"""Thinking that a generation prompt opens and the template leaves out of answers, as DeepSeek R1's and QwQ's.

An answer has to continue what the model is asked with. So the last answer continues the opened block: with
its own thinking, or with an empty block. Earlier answers stay as the template writes them.
"""

import re
from typing import Any

ENDS = "</think>"
OPENED = re.compile(r"<think>\s*\Z")
BEGINS = re.compile(r"\s*<think>")
EMPTY = "answers without thinking: an empty block closes the one that the prompt opens"


def opening_of(asked: str) -> str:
    """Return the opening of a block that a prompt ends with, or ""."""
    opening = OPENED.search(asked)
    return opening[0] if opening else ""


def opened_thinking(asked: str, answered: str) -> str:
    """Return the opening at the end of ``asked`` that ``answered`` leaves out, or ""."""
    opening = opening_of(asked)
    return (
        opening if not answered.startswith(asked) and answered.startswith(asked.removesuffix(opening)) else ""
    )


def without_thinking(text: str) -> str:
    """Return what follows the last block of thinking."""
    return text.rpartition(ENDS)[2]


def thinking_of(turn: dict[str, Any], opening: str) -> str:
    """Return the text between the opening and the answer; "" is never: an empty block is closed too."""
    content, blank = turn["content"], opening.removeprefix("<think>")
    thought, end, answer = content.rpartition(ENDS)
    if end:
        said = BEGINS.sub("", thought, count=1) if BEGINS.match(thought) else thought
        return f"{said.removeprefix(blank)}{ENDS}{answer[: len(answer) - len(answer.lstrip())]}"
    told = str(turn.get("reasoning_content") or turn.get("thinking") or "").strip("\n")
    return f"{'' if blank or told else chr(10)}{told}\n{ENDS}\n\n"


def has_thinking(turn: dict[str, Any]) -> bool:
    return ENDS in turn["content"] or any(turn.get(key) for key in ("reasoning_content", "thinking"))
