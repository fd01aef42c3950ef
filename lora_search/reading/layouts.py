"""The layout of rows: which columns contain question, context and answer, or the messages of a conversation.

Unambiguous names are recognised without any setting. Other columns are refused, with all missing parts at
once and the most likely columns; unused text is refused as well.
"""

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_search.errors import DataError
from lora_search.reading.columns import (
    CONTEXTS,
    LAYOUTS,
    NAMED,
    PARTS,
    USUAL,
    Content,
    listed,
    missing_columns,
    unknown_columns,
)
from lora_search.reading.conversations import conversation_row
from lora_search.reading.rows import Complaint, Record, Row
from lora_search.reading.text import is_blank
from lora_search.settings.data_schema import AUTO, OPTIONAL, DataConfig

TEXTUAL = {  # columns that the model should see, unless the user says otherwise -> the part it could be
    **dict.fromkeys(CONTEXTS, "context"), "system": "system", "system_prompt": "system", "tools": "tools",
    "functions": "tools", "history": "", "reasoning": "", "thinking": "", "explanation": "", "rationale": "",
}  # fmt: skip
EXTRAS = {"system": ("system", "systemInstruction", "system_instruction"), "tools": ("tools",)}
PROSE, DISTINCT = 60, 0.5  # mean characters and share of distinct values from which a column is text


@dataclass
class Layout:
    """One file's layout: ``columns`` maps part to column. Counts rows with unused text."""

    name: str
    columns: dict[str, str]
    config: DataConfig
    unused: Counter[str] = field(default_factory=Counter)
    prose: tuple[str, ...] = ()  # further columns with text

    def describe(self) -> str:
        return f"{self.name}: {', '.join(self.columns.values())}"

    def row(self, record: Record) -> Row | Complaint:
        """Return the row of a record, or why it cannot be used."""
        content = record.content
        if isinstance(content, Complaint):
            return content
        if not isinstance(content, dict):
            return _no_object(record)
        missing = [
            self.columns[part] for part in PARTS if part in self.columns and self.columns[part] not in content
        ]
        if missing:
            return missing_columns(record, missing)
        made = self._conversation(record) if self._is_conversation(content) else self._pair(record)
        if isinstance(made, Row):
            self._note_unused(content, made)
        return made

    def _is_conversation(self, content: Content) -> bool:
        """Return whether there are messages, or a system text or tools with question and answer."""
        if "messages" in self.columns or isinstance(content[self.columns["instruction"]], list):
            return True
        return any(content.get(self.columns.get(part, "")) for part in ("system", "tools"))

    def _pair(self, record: Record) -> Row | Complaint:
        texts = {"instruction": "", "context": "", "response": ""}
        for part in ("instruction", "context", "response"):
            value = record.content.get(self.columns.get(part, ""))
            if part == "context" and value is None:
                continue
            if complaint := complain(value, f'{record.place}: "{self.columns[part]}"', part != "context"):
                return complaint
            texts[part] = value
        if is_blank(texts["context"]):
            texts["context"] = ""
        return Row(texts["instruction"], texts["context"], texts["response"], record.source)

    def _conversation(self, record: Record) -> Row | Complaint:
        content = record.content
        system, tools = (content.get(self.columns.get(part, "")) for part in ("system", "tools"))
        if isinstance(system, str) and (complaint := complain(system, f'{record.place}: "system"', False)):
            return complaint
        messages = self._messages(record)
        if isinstance(messages, Complaint):
            return messages
        return conversation_row(messages, record, system=system, tools=tools)

    def _messages(self, record: Record) -> list[object] | Complaint:
        if "messages" in self.columns:
            column = self.columns["messages"]
            value = _parsed(record.content[column])
            if isinstance(value, list):
                return value
            rule = f'{record.place}: "{column}" is {type(value).__name__}, not a list of messages.'
            return Complaint("wrong type", rule)
        joined: list[object] = []
        for part, role in (("instruction", "user"), ("response", "assistant")):
            value = record.content[self.columns[part]]
            joined += value if isinstance(value, list) else [{"role": role, "content": value}]
        return joined

    def _note_unused(self, content: Content, row: Row) -> None:
        used = None
        for name in content.keys() & (TEXTUAL.keys() | set(self.prose)):
            used_elsewhere = (*self.columns.values(), *self.config.columns.ignore, self.config.group_by)
            if name in used_elsewhere or not content[name]:
                continue
            if TEXTUAL.get(name) and getattr(self.config.columns, TEXTUAL[name]) is None:
                continue
            value = content[name]
            used = used or f"{row.question}\n{row.response}\n{row.messages}"
            if not isinstance(value, str) or (not is_blank(value) and not _repeats(value, row, used)):
                self.unused[name] += 1

    def check_unused(self, place: str, num_rows: int) -> None:
        """Raise DataError if the rows contain unused text."""
        if not self.unused:
            return
        names = ", ".join(f'"{name}" ({count} of {num_rows} rows)' for name, count in self.unused.items())
        proposals = [f"data.columns.{TEXTUAL[n]}={n}" for n in self.unused if TEXTUAL.get(n)][:1]
        ignore = f"data.columns.ignore=[{','.join(self.unused)}]"
        remedy = f"Set {proposals[0]} to use it, or" if proposals else "To leave it out, set"
        raise DataError(f"{place} has text that is not used: {names}. {remedy} {ignore}.")


def recognise(contents: Sequence[object], config: DataConfig, place: str) -> Layout:
    """Return the layout of a file that begins so. DataError: all missing parts, with a proposal."""
    rows = [content for content in contents if isinstance(content, dict)]
    keys = list(dict.fromkeys(key for row in rows for key in row if isinstance(key, str)))
    chosen = config.columns.chosen()
    for part, column in chosen.items():
        if rows and column not in keys:
            remedy = f" or set data.columns.{part}=null" if part in OPTIONAL else ""
            near = difflib.get_close_matches(column, keys, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Name the column{remedy}."
            raise DataError(f"data.columns.{part}: no row has {column!r} (keys: {listed(keys)}). {hint}")
    name, columns = _known(rows, keys, config, chosen)
    needed = {"messages"} if "messages" in columns else {"instruction", "response"}
    if keys and not needed <= columns.keys():
        raise DataError(unknown_columns(rows, keys, columns, place, config))
    if not needed <= columns.keys():  # no readable row: each gets its own complaint
        columns = {"instruction": "instruction", "response": "response"}
    columns |= _extras(keys, columns, config)
    prose = [
        key for key in keys if key not in columns.values() and key not in TEXTUAL and _is_prose(rows, key)
    ]
    return Layout(name, columns, config, prose=tuple(prose))


def _known(
    rows: Sequence[Content], keys: Sequence[str], config: DataConfig, chosen: dict[str, str]
) -> tuple[str, dict[str, str]]:
    """Return the layout that most rows have, the first of several. The user's columns take precedence."""
    if chosen.keys() & {"messages", "instruction", "response"}:
        return "columns as set", _completed(keys, chosen)
    folded = {key.strip().lower(): key for key in reversed(keys)}
    best, most = ("", dict[str, str]()), (0, False)
    for name, required, optional in LAYOUTS:
        if config.format not in (AUTO, name) or not all(column in folded for column in required.values()):
            continue
        columns = {part: folded[column] for part, column in required.items()}
        if "messages" in columns and not _holds_lists(rows, columns["messages"]):
            continue
        fits = [all(column in row for column in columns.values()) for row in rows]
        fitting = (sum(fits), fits[0])  # of equal counts, the one that the first row has
        if fitting > most:
            context = {part: folded[column] for part, column in optional.items() if column in folded}
            keep = {} if config.columns.context is None else context
            best, most = (name, columns | keep | chosen), fitting
    if most[0] or config.format != AUTO:
        return best
    return "question and answer", _completed(keys, chosen)


def _completed(keys: Sequence[str], chosen: dict[str, str]) -> dict[str, str]:
    """Return the chosen columns; complete question and answer with the only column of a common name."""
    columns = dict(chosen)
    if "messages" in columns:
        return columns
    strange = [k for k in keys if k not in columns.values() and k.strip().lower() not in NAMED]
    answered = "response" in columns or any(key.strip().lower() in USUAL["response"] for key in keys)
    for part, names in USUAL.items():
        found = [key for key in keys if key.strip().lower() in names and key not in columns.values()]
        if part == "instruction" and (len(found) > 1 or len(strange) > (not answered)):
            found = [key for key in found if key.strip().lower() != "input"]  # it may be the context
        if part not in columns and len(found) == 1:
            columns[part] = found[0]
    return columns


def _extras(keys: Sequence[str], columns: dict[str, str], config: DataConfig) -> dict[str, str]:
    """Return the parts system and tools if columns with exactly these names exist."""
    return {
        part: key
        for part, names in EXTRAS.items()
        for key in names
        if key in keys and part not in columns and getattr(config.columns, part) == AUTO
    }


def complain(value: object, what: str, required: bool) -> Complaint | None:
    if value is None:
        return Complaint("missing field", f"{what} is missing or null.")
    if not isinstance(value, str):
        remedy = 'Put it in "quotes".' if isinstance(value, int | float) else "Write it as one text."
        return Complaint("wrong type", f"{what} is {type(value).__name__}, not text. {remedy}")
    if required and is_blank(value):
        return Complaint("empty field", f"{what} is empty.")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError:
        return Complaint("broken text", f"{what} has half a character (a lone surrogate) or is not UTF-8.")
    return None


def _no_object(record: Record) -> Complaint:
    kind = type(record.content).__name__
    message = f'{record.place} is a {kind}, not an object like {{"instruction": ..., "response": ...}}.'
    if isinstance(record.content, list) and ".jsonl:" in record.source:
        message += " Name the file .json if it is one list."
    return Complaint("not an object", message)


def _parsed(value: object) -> object:
    """Return the list if the value is one as JSON text; else the value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _holds_lists(rows: Sequence[Content], key: str) -> bool:
    return any(isinstance(_parsed(row.get(key)), list) for row in rows)


def _repeats(value: str, row: Row, used: str) -> bool:
    """Return whether the row already contains the text, or the text is a rendering of the row."""
    text = value.strip()
    return text in used or (row.response.strip() in text and row.instruction.strip() in text)


def _is_prose(rows: Sequence[Content], key: str) -> bool:
    """Return whether the rows mostly have different texts under this key, longer than labels or links."""
    values = [row.get(key) for row in rows]
    if not rows or not all(isinstance(value, str) and value.strip() for value in values):
        return False
    texts = [str(value) for value in values]
    is_linked = all(text.startswith(("http://", "https://")) for text in texts)
    is_long = sum(map(len, texts)) / len(texts) >= PROSE
    return is_long and not is_linked and len(set(texts)) >= DISTINCT * len(texts)
