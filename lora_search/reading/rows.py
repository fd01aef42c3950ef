"""The results of reading: records from files, checked rows, and notes about them."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Complaint:
    """Why a row cannot be used: the reason for counts, the message to show."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a file, not yet checked."""

    place: str  # "line 17 of faq.jsonl", for messages
    source: str  # "faq.jsonl:17"
    content: Any  # the parsed entry, or a Complaint


def numbered(contents: Iterable[Any], name: str) -> Iterator[Record]:
    """Yield the rows of a file or table as records with their places."""
    for number, content in enumerate(contents, start=1):
        yield Record(f"row {number} of {name}", f"{name}:{number}", content)


@dataclass(frozen=True, slots=True)
class Row:
    """One question with its answer, and its source ("faq.jsonl:17").

    For a conversation, ``instruction`` is its first question, ``response`` its last answer, and ``messages``
    all of it as JSON.
    """

    instruction: str
    context: str
    response: str
    source: str
    messages: str = ""
    tools: str = ""  # JSON: the functions that the assistant may call
    group: str = ""  # rows of one group stay in the same split
    split: str = ""  # train, validation or test if the user split the rows; "": to be split here
    weight: float = 1.0  # how often an epoch repeats it
    loss_weight: float = 1.0  # how much its tokens count in the training loss

    @property
    def question(self) -> str:
        return f"{self.instruction}\n\n{self.context}" if self.context else self.instruction

    @property
    def turns(self) -> list[dict[str, Any]]:
        """Return the messages for chat templates."""
        if self.messages:
            turns: list[dict[str, Any]] = json.loads(self.messages)
            return turns
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.response},
        ]

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """Return the tools for chat templates."""
        return json.loads(self.tools) if self.tools else None


@dataclass(frozen=True)
class Loaded:
    """Usable rows, counts of rows read and skipped, and notes for the user."""

    rows: list[Row]
    counts: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    revisions: dict[str, str] = field(default_factory=dict)  # hub data set -> commit
    digest: str = ""  # of the files' bytes
    reread: "Callable[[], Loaded] | None" = None  # reads the rows, if they were left unread
