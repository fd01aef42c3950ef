"""What reading gives: records as files hold them, checked rows, and what people should know of them."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Complaint:
    """Why a row cannot be used: the reason is counted, the message is shown."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a file, not yet checked."""

    place: str  # "line 17 of faq.jsonl", for messages
    source: str  # "faq.jsonl:17"
    content: Any  # the parsed entry, or a Complaint


@dataclass(frozen=True, slots=True)
class Row:
    """One question with its answer, and where it came from ("faq.jsonl:17").

    Of a conversation, ``instruction`` is its first question, ``response`` its last answer, and ``messages``
    holds all of it as JSON.
    """

    instruction: str
    context: str
    response: str
    source: str
    messages: str = ""
    tools: str = ""  # JSON: what the assistant may call
    group: str = ""  # rows of one group stand on one side of the split
    split: str = ""  # train, validation or test where the user split the rows; "": to be split here
    weight: float = 1.0  # how often an epoch shows it

    @property
    def question(self) -> str:
        return f"{self.instruction}\n\n{self.context}" if self.context else self.instruction

    @property
    def turns(self) -> list[dict[str, Any]]:
        """Return the messages, as chat templates take them."""
        if self.messages:
            turns: list[dict[str, Any]] = json.loads(self.messages)
            return turns
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.response},
        ]

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """Return the tools that the assistant may call, as chat templates take them."""
        return json.loads(self.tools) if self.tools else None


@dataclass(frozen=True)
class Loaded:
    """What was read: usable rows, counts of what was read and skipped, and what people should know of it."""

    rows: list[Row]
    counts: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    revisions: dict[str, str] = field(default_factory=dict)  # hub data set -> the commit that was read
    digest: str = ""  # of the bytes that were read
    reread: "Callable[[], Loaded] | None" = None  # where the rows were read before, and are left unread
