"""Decides when a text is blank, and when two texts are equal. Training uses every text unchanged."""

import re
import unicodedata

# Letters and marks by category that draw nothing: Hangul fillers, the blank Braille pattern, selectors.
DRAWN_AS_NOTHING = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")  # control, format (zero-width ones too), separators


def is_blank(text: str) -> bool:
    """Return whether the text is invisible: white space, zero-width characters, fillers."""
    if text and text[0].isascii() and text[0].isprintable() and not text[0].isspace():
        return False  # nearly all texts
    return all(unicodedata.category(character) in INVISIBLE for character in DRAWN_AS_NOTHING.sub("", text))


def normal_question(text: str) -> str:
    """Return the question without differences in white space and capitals."""
    return " ".join(text.split()).casefold()


def question_key(text: str) -> str:
    """Return a key that is equal for all spellings of a question: composed or not, full width or not, with or
    without zero-width characters."""
    if text.isascii():
        return normal_question(text)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    seen = "".join(
        c for c in DRAWN_AS_NOTHING.sub("", folded) if c.isspace() or unicodedata.category(c) != "Cf"
    )
    return normal_question(seen)


def is_indented(text: str) -> bool:
    """Return whether any line begins with white space."""
    return any(line[:1].isspace() and line.strip() for line in text.splitlines())


def normal_answer(text: str) -> str:
    """Return the answer without differences in white space other than line breaks and indentation."""
    lines = unicodedata.normalize("NFC", text).rstrip().splitlines()
    return "\n".join(line[: len(line) - len(line.lstrip())] + " ".join(line.split()) for line in lines)
