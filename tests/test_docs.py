"""Documentation names only what exists: its links, the tests and modules that it refers to, the commands."""

import re
from pathlib import Path

import pytest

from lora_search.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
FILE = re.compile(r"`(?:python -m pytest )?((?:tests|docs|conf|sweeps|lora_search)/[\w./]*)")
MODULE = re.compile(r"`((?:[a-z_]+/)?[a-z_]+\.(?:py|html\.j2))`")
BENCHMARK = re.compile(r"python -m (tests\.benchmarks\.\w+)")


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_link_leads_somewhere(name: str) -> None:
    links = [link for link in LINK.findall(TEXTS[name]) if "://" not in link]

    for link in links:
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_file_and_benchmark_that_is_named_exists() -> None:
    named = {(name, path) for name, text in TEXTS.items() for path in FILE.findall(text)}
    benchmarks = {
        ROOT / module.replace(".", "/") for text in TEXTS.values() for module in BENCHMARK.findall(text)
    }

    assert [(name, path) for name, path in named if not (ROOT / path).exists()] == []
    assert [
        one for one in benchmarks if not (ROOT / f"{one}.py").exists() and not (ROOT / one).is_dir()
    ] == []
    assert min(len(named), len(benchmarks)) > 5


def test_every_module_that_contributing_names_is_in_its_room() -> None:
    named = set(MODULE.findall(TEXTS["CONTRIBUTING.md"]))

    places = ROOT, ROOT / "lora_search"
    assert [path for path in sorted(named) if not any((place / path).exists() for place in places)] == []
    assert len(named) > 30


def test_every_page_is_reached_from_the_readme_and_every_command_is_described() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(TEXTS["README.md"])}
    rows = re.findall(r"^\| (`.*?) \|", TEXTS["docs/commands.md"].partition("##")[0], re.MULTILINE)

    assert {name for name in TEXTS if name.startswith("docs/")} <= linked
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(COMMANDS)
