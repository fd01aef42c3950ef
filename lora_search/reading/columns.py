"""The column names that people use, and what to say of columns that no layout fits: all missing parts at
once, with the most likely columns."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from lora_search.reading.rows import Complaint, Record
from lora_search.settings.data_schema import DataConfig

Content = dict[str, Any]

LAYOUTS: tuple[
    tuple[str, dict[str, str], dict[str, str]], ...
] = (  # name, required, optional: part -> column
    ("messages", {"messages": "messages"}, {}),
    ("sharegpt", {"messages": "conversations"}, {}),
    ("messages", {"messages": "conversation"}, {}),
    ("messages", {"messages": "chat"}, {}),
    ("gemini", {"messages": "contents"}, {}),
    ("prompt_completion", {"instruction": "prompt", "response": "completion"}, {}),
    ("instruction_response", {"instruction": "instruction", "response": "response"}, {"context": "context"}),
    ("alpaca", {"instruction": "instruction", "response": "output"}, {"context": "input"}),
    ("question_answer", {"instruction": "question", "response": "answer"}, {"context": "context"}),
)
USUAL = {  # further names; exactly one column of each part also makes a layout
    "instruction": ("instruction", "question", "prompt", "query", "q", "user", "human", "input"),
    "response": ("response", "answer", "output", "completion", "a", "reply", "assistant", "target", "gpt"),
}
NAMED = {*USUAL["instruction"], *USUAL["response"]}
CONTEXTS = ("context", "input", "passage", "background", "document")
PARTS = {"instruction": "question", "response": "answer", "messages": "messages"}


def unknown_columns(
    rows: Sequence[Content], keys: Sequence[str], columns: dict[str, str], place: str, config: DataConfig
) -> str:
    """Return the message with all missing parts, and what to set."""
    wanted = next((required for name, required, _ in LAYOUTS if name == config.format), None)
    if wanted is not None:
        absent = ", ".join(column for column in wanted.values() if column not in keys)
        return f"data.format: {config.format} needs the columns {absent} (there are: {listed(keys)})."
    missing = [part for part in ("instruction", "response") if part not in columns]
    parts = " and ".join(f"no {PARTS[part]}" for part in missing)
    is_text = all(isinstance(row.get(key), str | None) for row in rows[:1] for key in keys)
    if is_text and any(len(key) > 30 or key.rstrip().endswith(("?", ".")) for key in keys):  # a sentence
        said = f"{place} does not name its columns in its first line ({'; '.join(keys)[:60]})."
        return f"{said} Put a line above it, e.g. question,answer."
    if len(keys) == 1 and any(mark in keys[0] for mark in ",;|\t:"):
        return f"{place} has one column only, {keys[0]!r}. Separate columns by commas, semicolons or tabs."
    taken, proposals = set(columns.values()), []
    for part in missing:
        guess = _propose(part, rows, [key for key in keys if key not in taken])
        taken.add(guess)
        proposals.append(f"data.columns.{part}={guess}")
    untold = f"{place} has {parts} that could be recognised (columns: {listed(keys)})."
    for part in missing:
        for key in difflib.get_close_matches(USUAL[part][1], [key for key in keys if key not in taken]):
            kind = "a list" if any(isinstance(row.get(key), list) for row in rows) else "an object"
            return f'{untold} "{key}" is {kind}, not text. Write one text of it into a column of its own.'
    return f"{untold} Set {' '.join(proposals)}."


def _propose(part: str, rows: Sequence[Content], keys: Sequence[str]) -> str:
    """Return the most likely column of this part, by its name or its text; or NAME."""
    texts = [
        key
        for key in keys
        if any(isinstance(row.get(key), str) and row[key].strip() for row in rows) and key not in CONTEXTS[:2]
    ]
    usual = [key for key in texts if key.lower() in USUAL[part] and key.lower() != "input"]
    near = [
        key for name in USUAL[part][:4] for key in difflib.get_close_matches(name, texts, n=1, cutoff=0.75)
    ]
    if usual or near:
        return [*usual, *near][0]

    def asks(key: str) -> tuple[float, float]:
        values = [row[key].strip() for row in rows if isinstance(row.get(key), str)]
        return sum(v.endswith("?") for v in values) / len(values), -sum(map(len, values)) / len(values)

    if not texts:
        return "NAME"
    if part == "instruction":
        asking = [key for key in texts if asks(key)[0] > 0.5]
        longest = max(texts, key=lambda key: -asks(key)[1])
        others = [key for key in texts if key != longest]
        return max(asking, key=asks) if asking else (others or texts)[0]
    return max(texts, key=lambda key: -asks(key)[1])


def missing_columns(record: Record, missing: Sequence[str]) -> Complaint:
    names = " and ".join(f'no "{name}"' for name in missing)
    free = [key for key in record.content if key not in missing]
    pairs = [(name, next(iter(_alike(name, free)), None)) for name in missing]
    hints = [f'"{near}" to "{name}"' for name, near in pairs if near]
    remedy = f"Rename {' and '.join(hints)}" if hints else "Write it"
    return Complaint(
        "missing field",
        f"{record.place} has {names} (keys: {listed(free)}). {remedy} as the other rows have it.",
    )


def _alike(name: str, keys: Sequence[str]) -> list[str]:
    part = next((part for part, names in USUAL.items() if name.lower() in names), None)
    usual = [key for key in keys if part and str(key).lower() in USUAL[part]]
    return usual or difflib.get_close_matches(name, [str(key) for key in keys], n=1)


def listed(keys: Iterable[object]) -> str:
    return ", ".join(map(str, keys))
