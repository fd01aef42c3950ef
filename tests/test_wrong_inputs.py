"""The tables of wrong inputs, counted; and what a generator of wrong inputs finds: one message each.

In process: a message has a key, fits on a screen, comes with exit code 2, and nothing was written.
"""
# ruff: noqa: E501, PT017 (a table has long rows; either outcome is right, and an error has to be a good one)

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_search.errors import LoraSearchError
from lora_search.output.streams import MAX_CHARACTERS, MAX_LINES, clean, shorten
from lora_search.reading.load import load_rows
from lora_search.settings.composition import SWEEPS, compose
from lora_search.settings.data_schema import DataConfig
from lora_search.settings.explanations import known_keys
from lora_search.settings.schema import SweepConfig
from lora_search.settings.secrets import redact
from lora_search.settings.space import parse_space

SMOKE = (SWEEPS / "smoke.yaml").read_text()
KEYS = sorted(key for key in known_keys() if not key.startswith(("space", "launcher.worker")))
BOUNDED = {"deadline": None, "derandomize": True, "database": None,
           "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}  # fmt: skip
WORDS = st.sampled_from([
    "", "null", "true", "nan", ".inf", "-1", "0", "1e400", "9" * 30, "[]", "{}", "[1,2]", "{a: 1}", "'", '"', "a b", "\\",
    "${x}", "${oc.env:NOPE_2}", "${", "???", "choice(", "interval(1,0)", "choice()", "~", "../..", "/dev/zero", "\0",
    "\x1b[2J", "é", "\u202e", "=", "a=b", "@", "*", "&x", "!!python/name:os.system", "2024-99-99", "1_0", "0x1f", "x" * 5000,
])  # fmt: skip
TEXT = st.one_of(WORDS, st.text(max_size=20), st.integers().map(str), st.floats().map(str))


REMEDY = re.compile(  # what is allowed, or what to do about it
    r"\bmust |Did you mean|Its default is|can be searched|See --help|There are: "
    r"|\b(?:Add|Begin|Break|Change|Check|Choose|Compare|Cut|Delete|Export|Fill|Fix|Give|Indent|Join|Keep|Leave|Let|Lower|Make|Mend"
    r"|Name|Put|Quote|Raise|Remove|Rename|Repair|Save|Separate|[Ss]et|Shorten|Swap|Take|Try|Unpack|Use|Widen|Write)\b"
)


def refusal(error: LoraSearchError, key: str) -> str:
    """Return what the terminal shows of an error for wrong input: one screen, no control sequence; it begins
    with the key (a pattern) and says what to do."""
    text = clean(shorten(redact(str(error))))
    assert error.exit_code == 2
    assert 0 < len(text) <= MAX_CHARACTERS + 100  # the note of what was left out
    assert text.count("\n") <= MAX_LINES
    assert "\x1b" not in text
    assert re.match(key, text), text
    assert REMEDY.search(text), text
    return text


@settings(max_examples=15, **BOUNDED)  # type: ignore[arg-type]
@given(st.sampled_from(KEYS), TEXT)
def test_whatever_is_given_as_a_value_is_a_setting_or_one_message(key: str, value: str) -> None:
    try:
        config = compose("smoke", [f"{key}={value}"])
    except LoraSearchError as error:
        named = refusal(error, "")
        assert key in named or key.rpartition(".")[2] in named
    else:
        assert isinstance(config, SweepConfig)


KEY = r"(?:[\w./+~@ -]+): "  # a setting, a group or an entry of the defaults
LINES = st.sampled_from([*SMOKE.splitlines(), "study: {", "  - schema", "\ta: 1", "a: &a [*a]", "---", "? x", "space:", "  lora:",
                         "    r: choice(1", "<<: 3", "hydra:", "  run:", "defaults: []", "x: ${study}"])  # fmt: skip


@settings(max_examples=40, **BOUNDED)  # type: ignore[arg-type]
@given(st.lists(st.one_of(LINES, TEXT), max_size=12), st.booleans())
def test_whatever_a_sweep_file_says_is_a_sweep_or_one_message(lines: list[str], begins_well: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_bytes("\n".join([SMOKE if begins_well else "", *lines]).encode("utf-8", "surrogatepass"))
        try:
            parse_space(compose("mine", [], Path(folder)))
        except LoraSearchError as error:
            refusal(error, rf"{folder}/mine\.yaml|-cn mine: |{KEY}")
        assert os.listdir(folder) == ["mine.yaml"]


@settings(max_examples=150, **BOUNDED)  # type: ignore[arg-type]
@given(
    st.sampled_from(["lora.r", "optim.lr", "train.epochs", "lora.target_modules", "optim.schedule", "no.key"]),
    st.one_of(TEXT, st.lists(TEXT, max_size=3).map(lambda parts: f"choice({','.join(parts)})"),
              st.tuples(TEXT, TEXT).map(lambda ends: f"interval({ends[0]},{ends[1]})"),
              TEXT.map(lambda part: f"tag(log, interval(1, {part}))"),
              st.tuples(TEXT, TEXT, TEXT).map(lambda ends: f"range({','.join(ends)})")),
)  # fmt: skip
def test_whatever_is_searched_is_a_range_or_one_message(key: str, expression: str) -> None:
    section, name = key.split(".")
    config = SweepConfig(data=DataConfig(path="x"), space={section: {name: expression}})
    try:
        parse_space(config)
    except LoraSearchError as error:
        assert key in refusal(error, "")


SUFFIXES = [
    "jsonl",
    "json",
    "csv",
    "tsv",
    "txt",
    "parquet",
    "xlsx",
    "arrow",
    "jsonl.gz",
    "zip",
    "yaml",
    "bin",
]
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
                      lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
                          st.sampled_from(["messages", "role", "content", "instruction", "response", "", "x"]), inner,
                          max_size=3)), max_leaves=8)  # fmt: skip
CONTENT = st.one_of(
    st.binary(max_size=200),
    st.lists(VALUES, max_size=4).map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode()),
    st.lists(st.lists(st.text(max_size=6), max_size=4), max_size=4).map(
        lambda rows: "\n".join(",".join(row) for row in rows).encode("utf-8", "replace")
    ),
    st.sampled_from([b"PK\x03\x04", b"PAR1", b"\x1f\x8b\x08", b"ARROW1\0\0"]).flatmap(
        lambda head: st.binary(max_size=60).map(lambda tail: head + tail)
    ),
)


@settings(max_examples=150, **BOUNDED)  # type: ignore[arg-type]
@given(st.sampled_from(SUFFIXES), CONTENT)
def test_whatever_a_data_file_holds_is_rows_or_one_message(suffix: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"faq.{suffix}"
        path.write_bytes(content)
        try:
            load_rows(DataConfig(path=str(path)))
        except LoraSearchError as error:
            refusal(error, rf"data\.\w+(?:\.\w+)?: .*{re.escape(path.name)}|data\.\w+(?:\.\w+)?: ")
        assert os.listdir(folder) == [path.name]


@pytest.mark.slow
def test_the_tables_hold_hundreds_of_wrong_inputs() -> None:
    """Counts what pytest collects. The grid of impossible numbers is counted apart: it is cheap to extend."""
    files = sorted({str(path) for path in Path(__file__).parent.rglob("test_*.py") if _has_table(path)})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-n0"]
    done = subprocess.run([*command, "-m", "wrong_input", *files], capture_output=True, text=True, check=True)
    found = {line for line in done.stdout.splitlines() if "::" in line}
    by_hand = {line for line in found if "test_ranges.py" not in line}

    assert len(by_hand) >= 300, len(by_hand)
    assert len(found) - len(by_hand) >= 250


def _has_table(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.Attribute) and node.attr == "wrong_input" for node in ast.walk(tree))
