"""Rows before training: lengths, what each maximum length would cut, text with the loss mask in colour; for
the terminal, and as one HTML file."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from lora_search.data.rows import Pair

BARS = 12
WIDTH = 40
LIMITS = (128, 256, 512, 1024, 2048, 4096, 8192)
LEARNT = "bold green"
STYLE = "body{font:15px system-ui;max-width:60em;margin:2em auto}pre{white-space:pre-wrap;padding:1em}"
MARK = "mark{background:#b7f0c0}"


@dataclass(frozen=True)
class ShownRow:
    """One row: pieces of its text, each with whether the model learns it."""

    pieces: tuple[tuple[str, bool], ...]
    num_tokens: int


def shown_row(pair: Pair, num_tokens: int) -> ShownRow:
    learnt = ((part, i % 2 == 0) for i, part in enumerate(pair.parts))
    return ShownRow(((pair.prompt, False), *learnt), num_tokens)


def histogram(lengths: Sequence[int]) -> list[str]:
    """Return a histogram of the row lengths in tokens, from the shortest to the longest, one line per bar."""
    least, most = min(lengths), max(lengths)
    step = -(-(most - least + 1) // BARS)
    counts = [0] * ((most - least) // step + 1)
    for length in lengths:
        counts[(length - least) // step] += 1
    return [
        f"{least + i * step:>6} - {least + (i + 1) * step - 1:<6}"
        f"{'#' * -(-count * WIDTH // max(counts)):<{WIDTH}} {count}"
        for i, count in enumerate(counts)
    ]


def cut_table(lengths: Sequence[int]) -> list[str]:
    """Return how much each maximum length would cut."""
    most, total = max(lengths), sum(lengths)
    limits = [limit for limit in LIMITS if limit < most] + [most]
    return [
        f"data.max_length={limit:<6} cuts {sum(n > limit for n in lengths)} of {len(lengths)} rows, "
        f"{sum(max(0, length - limit) for length in lengths) / total:.1%} of the tokens"
        for limit in limits
    ]


def coloured(row: ShownRow) -> Text:
    """Return the row for the terminal, without control characters."""
    text = Text()
    for piece, is_learnt in row.pieces:
        text.append(_harmless(piece), style=LEARNT if is_learnt else "")
    return text


def _harmless(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def page(title: str, lines: Sequence[str], lengths: Sequence[int], rows: Sequence[ShownRow]) -> str:
    """Return lengths and rows as one HTML page."""
    shown = "".join(f"<h3>{row.num_tokens} tokens</h3><pre>{_marked(row)}</pre>" for row in rows)
    said = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    tables = html.escape("\n".join([*histogram(lengths), "", *cut_table(lengths)]))
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}{MARK}</style>"
        f"<h1>{html.escape(title)}</h1>{said}<h2>Tokens in a training row</h2><pre>{tables}</pre>"
        f"<h2>Rows as the model sees them</h2><p>It learns <mark>the marked text</mark>.</p>{shown}"
    )


def _marked(row: ShownRow) -> str:
    escaped = [(html.escape(_harmless(piece)), is_learnt) for piece, is_learnt in row.pieces]
    return "".join(f"<mark>{piece}</mark>" if is_learnt else piece for piece, is_learnt in escaped)
