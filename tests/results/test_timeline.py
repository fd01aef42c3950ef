"""The slots' time: what was busy, what was idle, and that time between two starts is nobody's."""

import json
from dataclasses import replace

import pytest

from lora_search.results.timeline import lanes_of
from lora_search.trial import TrialRow
from tests.rows import make_row


def trial(number: int, began: float, ended: float | None) -> TrialRow:
    return replace(make_row(number), began=began, ended=ended)


def test_trials_lie_in_as_many_lanes_as_ran_at_once() -> None:
    rows = [trial(0, 110, 150), trial(1, 110, 130), trial(2, 130, 190), trial(3, 160, None)]

    lanes = lanes_of(rows, {"worked": json.dumps([[100, 200]])})

    assert lanes is not None
    assert [[bar.row.number for bar in lane] for lane in lanes.lanes] == [[0, 3], [1, 2]]
    assert (lanes.set_up, lanes.last, lanes.seconds) == (10, 100, 100)
    assert lanes.busy == pytest.approx((40 + 20 + 60 + 40) / (2 * 90))


def test_workers_have_lanes_of_their_own_unless_one_followed_the_other() -> None:
    spans = [(0, 110, 150, "a"), (1, 110, 130, "b"), (2, 135, 190, "b"), (3, 160, 190, "c")]
    rows = [replace(trial(n, begin, end), worker=worker) for n, begin, end, worker in spans]

    lanes = lanes_of(rows, {"worked": json.dumps([[100, 200]])})

    assert lanes is not None
    assert [[bar.row.number for bar in lane] for lane in lanes.lanes] == [[0, 3], [1, 2]]
    assert (lanes.sizes, lanes.bounds) == ([1, 1], [1])


def test_the_night_between_two_starts_is_left_out() -> None:
    rows = [trial(0, 110, 50_020)]

    lanes = lanes_of(rows, {"worked": json.dumps([[100, 150], [50_000, 50_030]])})

    assert lanes is not None
    assert [(bar.begin, bar.end) for bar in lanes.lanes[0]] == [(10, 70)]
    assert (lanes.seconds, lanes.breaks) == (80, [50])


def test_an_older_study_has_no_lanes() -> None:
    assert lanes_of([make_row(0)], {}) is None
    assert lanes_of([trial(0, 1, 2)], {}) is None
