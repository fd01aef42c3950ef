"""Checks a user's own sweep file before Hydra reads it: one message with file and line for any mistake.
Reads at most LARGEST bytes."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

import yaml
from omegaconf._utils import get_yaml_loader
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lora_search.errors import InputError

LARGEST = 1_000_000  # bytes; the largest packaged sweep has 800
MOST_NODES = 20_000  # with anchors expanded: ten lines of them can expand to billions
BEGIN = "Begin it with `defaults: [schema, ...]`, as the files in sweeps/ do"


def check_sweep_file(path: Path, lists: Iterable[str] = ()) -> None:
    """Raise InputError if the file cannot be a sweep. ``lists`` are the keys whose values are lists."""
    text = read_text(path)
    try:
        root = yaml.compose(text, Loader=get_yaml_loader())
        if root is not None:
            _count_nodes(root, {}, ())
            yaml.load(text, Loader=get_yaml_loader())  # noqa: S506 (a safe loader that rejects duplicate keys)
    except yaml.YAMLError as error:
        raise InputError(explain_yaml(error, path)) from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply. {BEGIN}.") from None
    except ValueError as error:  # a date like 2024-99-99
        raise InputError(f"{path}: holds a value that cannot be read ({error}). Put it in quotes.") from None
    if root is None:
        raise InputError(f"{path}: is empty. {BEGIN}.")
    if not isinstance(root, MappingNode):
        kind = "a list" if isinstance(root, SequenceNode) else "a single value"
        raise InputError(f"{path}, line {root.start_mark.line + 1}: is not a sweep but {kind}. {BEGIN}.")
    _check_defaults(root, path)
    _check_sections(root, path, lists)


def check_groups(folder: Path, groups: Path) -> None:
    """Raise InputError for a file in the user's own config groups that is too large or unreadable."""
    for group in sorted(path.name for path in groups.iterdir() if (folder / path.name).is_dir()):
        for path in sorted((folder / group).rglob("*.yaml")):
            if not path.is_dir():
                read_text(path)


def line_of(path: Path, key: str) -> int | None:
    """Return the line of a dotted key in a sweep file, None if the file lacks it."""
    found = _entry(yaml.compose(read_text(path), Loader=get_yaml_loader()), key)
    return None if found is None else found[0]


def _entry(root: Node | None, key: str) -> tuple[int, Node] | None:
    """Return line and value of a dotted key, None if it is not there."""
    line, node = 0, root
    for name in key.split("."):
        pairs = node.value if isinstance(node, MappingNode) else []
        found = next(((k, v) for k, v in pairs if isinstance(k, ScalarNode) and k.value == name), None)
        if found is None:
            return None
        line, node = found[0].start_mark.line + 1, found[1]
    assert node is not None
    return line, node


def read_text(path: Path) -> str:
    """Return the text of a file. Raises InputError unless it is a readable UTF-8 file of a sensible size."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: is a folder. Give the name of a .yaml file in -cd DIR.")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is not a regular file. Give the name of a .yaml file in -cd DIR.")
        if status.st_size > LARGEST:
            rule = f"a sweep has at most {LARGEST:,} bytes, this file has {status.st_size:,}"
            raise InputError(f"{path}: {rule}. Is it a data file? That is data.path.")
        content = path.read_bytes()
    except OSError as error:
        hint = f" It links to {os.readlink(path)}." if path.is_symlink() else ""
        raise InputError(f"{path}: cannot be read: {error.strerror}.{hint} Check the path.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        remedy = "Save it as UTF-8"
        raise InputError(f"{path}, line {line}: is not UTF-8. {remedy}.") from None


def explain_yaml(error: yaml.YAMLError, path: Path | str) -> str:
    """Return file, line and what is wrong there."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    remedy = "Indent with spaces" if "\\t" in problem else "Fix that line"
    if "duplicate key" in problem:
        remedy = "Remove one of the two"
    named = getattr(mark, "name", "")
    shown = named if str(named).endswith((".yaml", ".yml")) else path
    where = "" if mark is None else f", line {mark.line + 1}"
    return f"{shown}{where}: is not valid YAML: {problem}. {remedy}."


def _check_defaults(root: MappingNode, path: Path) -> None:
    found = [value for key, value in root.value if isinstance(key, ScalarNode) and key.value == "defaults"]
    if not found:
        raise InputError(f"{path}: has no `defaults`. {BEGIN}.")
    where = f"{path}, line {found[0].start_mark.line + 1}"
    if not isinstance(found[0], SequenceNode):
        raise InputError(f"{where}: defaults must be a list. {BEGIN}.")
    for item in found[0].value:
        fits = isinstance(item, ScalarNode | MappingNode)
        if isinstance(item, MappingNode):
            fits = len(item.value) == 1
        if not fits or (
            isinstance(item, ScalarNode) and item.tag.endswith((":null", ":bool", ":int", ":float"))
        ):
            line = f"{path}, line {item.start_mark.line + 1}"
            raise InputError(f"{line}: each of the defaults must be NAME or GROUP: CHOICE. {BEGIN}.")


def _check_sections(root: MappingNode, path: Path, lists: Iterable[str]) -> None:
    """Refuse a section of Hydra's own, which would have no effect, and settings where a list must be."""
    hydra = _entry(root, "hydra")
    sections = hydra[1].value if hydra is not None and isinstance(hydra[1], MappingNode) else []
    if hydra is not None and any(key.value != "searchpath" for key, _ in sections):
        rule = "hydra: Hydra only composes the settings here, so the section has no effect"
        raise InputError(f"{path}, line {hydra[0]}: {rule}. Leave it out; runs_dir is the folder.")
    for key in lists:
        found = _entry(root, key)
        if found is not None and isinstance(found[1], MappingNode):
            raise InputError(f"{path}, line {found[0]}: {key}: must be a list, got settings. Write [a, b].")


def _count_nodes(node: Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Return the number of nodes with every anchor expanded."""
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="an anchor contains itself", problem_mark=node.start_mark)
    if id(node) not in known:
        children: list[Node] = []
        if isinstance(node, MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_count_nodes(child, known, (*above, id(node))) for child in children)
    if known[id(node)] > MOST_NODES:
        problem = f"it has more than {MOST_NODES:,} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return known[id(node)]
