"""A sweep file of one's own that is none: one message with file and line, whichever way the file is wrong."""
# ruff: noqa: E501 (a table has long rows)

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_search.errors import InputError
from lora_search.settings.composition import SWEEPS, compose, compose_study, help_page
from lora_search.settings.space import parse_space

SMOKE = (SWEEPS / "smoke.yaml").read_text()
NAMED, BODY = "name: smoke", SMOKE[SMOKE.index("study:") :]
STUDY = "study:\n" + SMOKE.partition("study:\n")[2].partition("data:\n")[0]
BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
SMOKE_LINES = SMOKE.splitlines()
NUMBERS = {  # as the messages name them: the file may grow
    "SECOND_AFTER_END": len(SMOKE_LINES) + 3,
    "AFTER_END": len(SMOKE_LINES) + 2,
    "END": len(SMOKE_LINES) + 1,
    "TRIALS": SMOKE_LINES.index("  n_trials: 8") + 1,
    "STUDY": SMOKE_LINES.index("study:") + 1,
    "NAME": SMOKE_LINES.index(f"  {NAMED}") + 1,
}


def placed(message: str) -> str:
    """Return the message with the lines of smoke.yaml as it is."""
    for name, number in NUMBERS.items():
        message = message.replace(f"line {name}", f"line {number}")
    return message


WRONG: dict[str, tuple[str | bytes, str]] = {
    "a section twice": (SMOKE + "study:\n  name: x\n", "line END: is not valid YAML: found duplicate key study"),
    "a key twice": (SMOKE.replace(NAMED, f"{NAMED}\n  name: y"), "line TRIALS: .* found duplicate key name"),
    "a tab": (SMOKE.replace(f"  {NAMED}", f"\t{NAMED}"), "line NAME: .* Indent with spaces"),
    "latin-1": ((SMOKE + "# é\n").encode("latin-1"), "line END: is not UTF-8. Save it as UTF-8"),
    "utf-16": (SMOKE.encode("utf-16"), "line 1: is not UTF-8"),
    "empty": ("", "is empty. Begin it with `defaults"),
    "a comment": ("# later\n", "is empty"),
    "no defaults": (BODY, "has no `defaults`"),
    "no schema": (SMOKE.replace("  - schema\n", ""), "is not a sweep: it lacks `schema`"),
    "a list": ("- a\n- b\n", "line 1: is not a sweep but a list"),
    "a word": ("hello\n", "line 1: is not a sweep but a single value"),
    "a number": ("3\n", "is not a sweep but a single value"),
    "null": ("null\n", "is not a sweep but a single value"),
    "two documents": (SMOKE + "---\n" + SMOKE, "line END: is not valid YAML: but found another document"),
    "defaults are a tree": ("defaults:\n  schema: x\n", "line 2: defaults must be a list"),
    "defaults are null": ("defaults:\n", "line 1: defaults must be a list"),
    "defaults are a word": ("defaults: schema\n", "line 1: defaults must be a list"),
    "a default is a number": ("defaults:\n  - 3\n", "line 2: each of the defaults must be NAME or GROUP"),
    "a default is a list": ("defaults:\n  - [a]\n", "line 2: each of the defaults must be NAME"),
    "two choices in one": ("defaults:\n  - {model: a, data: b}\n", "line 2: each of the defaults must be"),
    "it holds itself": ("defaults:\n  - schema\n  - mine\n  - _self_\n", "refers to itself.* Break the loop"),
    "no such choice": ("defaults:\n  - schema\n  - model: nope\n", "model/nope: there is no such choice"),
    "no such group": ("defaults:\n  - schema\n  - grp: x\n", "grp/x: there is no such group. --help"),
    "a file elsewhere": ("defaults:\n  - schema\n  - /etc/passwd\n", "there is no file etc/passwd.yaml"),
    "a bomb of anchors": (BOMB + SMOKE, "it has more than 20,000 values"),
    "an anchor in itself": (SMOKE + "space: &x\n  a: *x\n", "an anchor contains itself"),
    "an unknown section": (SMOKE + "foo: 1\n", "line END: foo: there is no such setting"),
    "a misspelt key": (SMOKE.replace("n_trials", "n_trial"), "line TRIALS: study.n_trial: .* Did you mean study.n_t"),
    "a section of Hydra's own": (SMOKE + "hydra:\n  run:\n    dir: x\n", "line END: hydra: Hydra only composes"),
    "settings for a list": (
        SMOKE + "lora:\n  target_modules: {a: 1}\n", "lora.target_modules: must be a list, got settings",
    ),
    "a number for hydra": (SMOKE + "hydra: 3\n", "line END: hydra: must be a group of settings"),
    "a variable that is not set": (
        SMOKE.replace(NAMED, "name: ${oc.env:NOPE_1}"),
        "line NAME: study.name: the environment variable NOPE_1 is not set. Set it .export NOPE_1=",
    ),
    "a setting that is not": (SMOKE.replace(NAMED, "name: ${no}"), "line NAME: study.name: ..no. is not a setting"),
    "a circle": (SMOKE.replace(NAMED, "name: ${study.name}"), "line NAME: study.name: refers to itself"),
    "no such resolver": (SMOKE.replace(NAMED, "name: ${nope:x}"), "study.name: there is no resolver nope"),
    "an open brace": (SMOKE.replace(NAMED, "name: '${oc.env:'"), "cannot be"),
    "nested too deeply": ("a: " + "[" * 2000 + "]" * 2000, "is nested too deeply"),
    "a zero byte": (SMOKE + "\0", "unacceptable character"),
    "an escape": (SMOKE + "\x1b[2J: 1\n", "unacceptable character"),
    "too large": ("#" * 2_000_000, "at most 1,000,000 bytes, this file has 2,000,000"),
    "a number as key": (SMOKE + "1: 2\n", "1: there is no such setting"),
    "null as key": (SMOKE + "null: 2\n", "Incompatible key type"),
    "a truth as key": (SMOKE + "true: 2\n", "True: there is no such setting"),
    "a list as key": (SMOKE + "[a]: 2\n", "line END: is not valid YAML"),
    "a python object": (SMOKE + "a: !!python/object/apply:os.system [ls]\n", "line END: .*could not determine"),
    "an unknown tag": (SMOKE + "a: !foo 1\n", "line END: is not valid YAML"),
    "a word for a section": (SMOKE.replace(STUDY, "study: x\n"), "line STUDY: study: must be a group of settings"),
    "a list for a section": (SMOKE.replace(STUDY, "study: [1]\n"), "line STUDY: study: must be a group of"),
    "null for a section": (SMOKE.replace(STUDY, "study: null\n"), "line STUDY: study: must have a value, got null"),
    "a list for the space": (SMOKE + "space: [1]\n", "line END: space: must be settings"),
    "a word for the space": (SMOKE + "space: x\n", "line END: space: "),
    "null for the space": (SMOKE + "space: null\n", "line END: space: must have a value"),
    "a value in the space": (SMOKE + "space:\n  lora:\n    r: 3\n", "space.lora.r: must be a sweep, got 3"),
    "a number in the space": (SMOKE + "space:\n  1: x\n", "line AFTER_END: space.1: "),
    "half a sweep": (SMOKE + "space:\n  lora:\n    r: choice(\n", "space.lora.r: is not in the sweep grammar"),
    "a variable in the space": (
        SMOKE + "space:\n  optim:\n    lr: choice(${oc.env:NOPE_1})\n",
        "line SECOND_AFTER_END: space.optim.lr: the environment variable NOPE_1",
    ),
    "a package": ("# @package foo\n" + SMOKE, "it lacks `schema`"),
    "a group twice": (SMOKE.replace("  - data:", "  - model: tiny_llama\n  - data:"), "model appears more than once"),
    "an open choice": (SMOKE.replace("model: tiny_llama", "model: ???"), "You must specify 'model'"),
    "another type": (SMOKE.replace("n_trials: 8", "n_trials: many"), "line TRIALS: study.n_trials: Value 'many'"),
    "a tree for a value": (SMOKE.replace("n_trials: 8", "n_trials:\n    a: 1"), "line TRIALS: study.n_trials: Value"),
    "infinity": (SMOKE.replace("n_trials: 8", "n_trials: .inf"), "line TRIALS: study.n_trials: Value 'inf'"),
    "a merge of a number": (SMOKE.replace("n_trials: 8", "<<: 3"), "line TRIALS: is not valid YAML"),
}  # fmt: skip


@pytest.mark.wrong_input
@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_sweep_is_one_message(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(InputError, match=placed(message)) as refused:
        parse_space(compose("mine", [], tmp_path))

    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)


def broken_link(path: Path) -> None:
    path.symlink_to("/no/where")


def loop(path: Path) -> None:
    path.symlink_to(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def yml(path: Path) -> None:
    path.with_suffix(".yml").write_text(SMOKE)


PLACES: list[tuple[Callable[[Path], object], str]] = [
    (Path.mkdir, "mine.yaml: is a folder"),
    (os.mkfifo, "mine.yaml: is not a regular file"),
    (broken_link, "mine.yaml: cannot be read: No such file or directory. It links to /no/where"),
    (loop, "mine.yaml: cannot be read: Too many levels of symbolic links"),
    (endless, "mine.yaml: is not a regular file"),
    (yml, "-cn mine: a sweep's file ends in .yaml. Rename mine.yml to mine.yaml."),
]


@pytest.mark.wrong_input
@pytest.mark.parametrize(("make", "message"), PLACES)
def test_what_is_no_file_is_refused_without_reading_it_also_in_help_and_report(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "mine.yaml")

    for ask in (compose, help_page, compose_study):
        with pytest.raises(InputError, match=placed(message)):
            ask("mine", [], tmp_path)


def test_a_choice_of_ones_own_that_is_a_pipe_hangs_nobody(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "own.yaml")

    with pytest.raises(InputError, match="own.yaml: is not a regular file"):
        compose("smoke", ["model=own"], tmp_path)


def test_a_file_with_a_byte_order_mark_or_without_self_is_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(SMOKE.encode("utf-8-sig"))
    (tmp_path / "other.yaml").write_text(SMOKE.replace("  - _self_\n", ""))

    assert compose("mine", [], tmp_path) == compose("other", [], tmp_path) == compose("smoke", [])
