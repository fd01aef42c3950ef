"""The report in a real browser: nothing fails, nothing is cut off, on a phone, a desk and on paper."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora_search.page.report import write_report
from lora_search.results.record import StudyRecord
from lora_search.results.samples import Sample, write_samples
from lora_search.trial import TrialRow
from tests.page.browser import CHROMIUM, chromium, look_at
from tests.rows import ATTRIBUTES, HOSTILE, ROWS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]
KEYS = [f"optim.some_longer_setting_{number}" for number in range(8)]  # with r, lr and layers: 11


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all of its parts: 11 settings, samples, timeline, lengths, hostile text."""
    folder = tmp_path_factory.mktemp("faq")
    rows = [full(row) for row in ROWS]
    attributes = {
        **ATTRIBUTES,
        "worked": json.dumps([[1000.0, 1200.0], [9000.0, 9300.0]]),
        "length_histogram": json.dumps({"width": 16, "counts": [1, 5, 9, 14, 8, 2]}),
        "command": "python -m lora_search.sweep -cn construction_faq " + "data.path=a_long_path/" * 12,
    }
    write_samples(folder, rows[5], 96, [Sample("What? " * 30, "Yes.", HOSTILE, "Word" * 80)])
    write_report(StudyRecord(rows, attributes, folder))
    return folder / "report.html"


def full(row: TrialRow) -> TrialRow:
    more: dict[str, object] = dict.fromkeys(KEYS, 0.1 * (row.number % 5 + 1))
    began = 1020.0 + 40 * (row.number // 4)
    return replace(
        row,
        params={**row.params, **more},
        began=began,
        ended=began + 35,
        worker=f"host:{row.number % 2}",
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("browser")) as address:
        yield address


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_fails_and_nothing_runs_out_of_the_window(browser: str, page: Path, width: int) -> None:
    seen = look_at(browser, page, width)

    assert seen.faults == []
    assert seen.width <= width
    assert all(
        set(name.split()) & {"wide"} or name == "" for name in seen.scrolled
    )  # tables and figures only
    assert width < 1280 or "wide" not in seen.scrolled  # 11 searched settings fit a desk


def test_it_prints_whole_on_a4(browser: str, page: Path) -> None:
    seen = look_at(browser, page, 1280)

    assert seen.outside == 0
    assert 3 <= seen.pdf_pages <= 12


def test_dark_is_dark_and_light_is_light(browser: str, page: Path) -> None:
    dark, light = (look_at(browser, page, 1280, is_dark=is_dark).colours for is_dark in (True, False))

    assert sum(dark[0]) < 150 < 600 < sum(light[0])  # the page
    assert sum(dark[1]) > 600 > 150 > sum(light[1])  # the letters
