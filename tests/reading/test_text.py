"""When a text says nothing, and when two say the same."""

import unicodedata

import pytest

from lora_search.data.splitting import split, without_duplicates
from lora_search.reading.rows import Row
from lora_search.reading.text import is_blank, normal_question, question_key
from lora_search.settings.schema import DataConfig

INVISIBLE = ["", " \t\n", "\u200b", "\u200b\u200c\u200d\u2060\ufeff", "\u00ad", "\u3164", "\u2800",
             "\u115f\u1160", "\u200e\u202a\u202c", "\u2028", "\u00a0\u3000", "\ufe0f", "\u0000",
             "\U000e0020"]  # fmt: skip
VISIBLE = ["a", "\u200ba", " .", "é", "e\u0301", "漢", "👩\u200d🚀", "0"]
SPELLINGS = [  # of one question each
    ("Où est le café?", "Où est le cafe\u0301?"),
    ("What is a ﬁle?", "What is a file?"),
    ("Ｗｈａｔ?", "what?"),
    ("Why?", " \u200bW\u200bhy? "),
    ("co\u00adoperate", "cooperate"),
    ("Straße", "STRASSE"),
    ("10\u00a0m²", "10 M2"),
]


@pytest.mark.parametrize("text", INVISIBLE)
def test_what_cannot_be_seen_is_blank(text: str) -> None:
    assert is_blank(text)


@pytest.mark.parametrize("text", VISIBLE)
def test_what_can_be_seen_is_not_blank(text: str) -> None:
    assert not is_blank(text)


@pytest.mark.parametrize("pair", SPELLINGS)
def test_spellings_of_one_question_are_one_question(pair: tuple[str, str]) -> None:
    assert question_key(pair[0]) == question_key(pair[1])


@pytest.mark.parametrize(("one", "other"), [("Why?", "Why"), ("x", "x\u0301"), ("1", "2"), ("a b", "ab")])
def test_other_questions_are_others(one: str, other: str) -> None:
    assert question_key(one) != question_key(other)


@pytest.mark.parametrize("text", ["What  is\nIT?", "Vad är ett bygglov?", "価格は?"])
def test_the_key_of_ordinary_text_is_what_it_always_was(text: str) -> None:
    assert question_key(text) == normal_question(text) == " ".join(text.split()).casefold()


@pytest.mark.parametrize("seed", range(4))
def test_composed_and_decomposed_questions_are_never_on_both_sides(seed: int) -> None:
    composed = [Row(f"Où est le café {i}?", "", "Là.", f"a:{i}") for i in range(60)]
    decomposed = [
        Row(unicodedata.normalize("NFD", row.instruction), "", "Ici.", row.source.replace("a", "b"))
        for row in composed
    ]

    parts = split([*composed, *decomposed], DataConfig(validation_fraction=0.3), seed)

    sides = {name: {question_key(row.question) for row in part} for name, part in parts.items()}
    assert [len(part) for part in parts.values()] == [2 * len(side) for side in sides.values()]
    assert sum(len(side) for side in sides.values()) == 60


def test_the_text_is_kept_as_given() -> None:
    rows = [Row("Cafe\u0301?", "", " a\u200b\n", "a")]

    kept = split(without_duplicates(rows), DataConfig(), 0)

    assert sum(kept.values(), []) == rows


@pytest.mark.parametrize(
    ("one", "other", "left"),
    [
        ("if x:\n    y()", "if x:\ny()", 2),
        ("  a", "a", 2),
        ("a\n\tb", "a\n    b", 2),
        ("- a\n- b", "- a - b", 2),
        ("a  b", "a b", 1),
        ("a\n", "a", 1),
        ("café", "cafe\u0301", 1),
    ],
)
def test_answers_that_differ_in_lines_or_indentation_are_no_duplicates(
    one: str, other: str, left: int
) -> None:
    rows = [Row("Why?", "", one, "a"), Row("Why?", "", other, "b")]

    assert len(without_duplicates(rows)) == left
    assert {row.response for row in without_duplicates(rows)} == {
        row.response for row in without_duplicates(rows[::-1])
    } or left == 1
