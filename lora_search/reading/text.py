"""When a text says nothing, and when two texts say the same. Training takes every text as it was given."""

import re
import unicodedata

# Letters and marks by their category, but nothing is drawn: fillers of Hangul, Braille's blank, selectors.
DRAWN_AS_NOTHING = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")  # control, format (zero-width ones too), separators


def is_blank(text: str) -> bool:
    """Return whether nothing of the text can be seen: white space, zero-width characters, fillers."""
    if text and text[0].isascii() and text[0].isprintable() and not text[0].isspace():
        return False  # as nearly all do
    return all(unicodedata.category(character) in INVISIBLE for character in DRAWN_AS_NOTHING.sub("", text))


def normal_question(text: str) -> str:
    """Return what makes a question the same question: not its white space, not its capitals."""
    return " ".join(text.split()).casefold()


def question_key(text: str) -> str:
    """Return what all spellings of a question share: composed or not, wide or not, with zero-width characters
    or without."""
    if text.isascii():
        return normal_question(text)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    seen = "".join(
        c for c in DRAWN_AS_NOTHING.sub("", folded) if c.isspace() or unicodedata.category(c) != "Cf"
    )
    return normal_question(seen)


def is_indented(text: str) -> bool:
    """Return whether a line of it begins with white space."""
    return any(line[:1].isspace() and line.strip() for line in text.splitlines())


def normal_answer(text: str) -> str:
    """Return what makes an answer the same answer: its lines with their indentation, not the other white
    space."""
    lines = unicodedata.normalize("NFC", text).rstrip().splitlines()
    return "\n".join(line[: len(line) - len(line.lstrip())] + " ".join(line.split()) for line in lines)
