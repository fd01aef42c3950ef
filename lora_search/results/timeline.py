"""When each trial trained: trials in lanes, over the time in which any worker was running.

Which slot a trial had is not recorded: a lane holds trials of one worker that do not overlap, so that each
worker has as many lanes as it trained trials at once. A worker that began when another had ended takes its
lanes. Pure.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lora_search.trial import TrialRow

Span = tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """A trial in its lane, in seconds of work since the study began."""

    row: TrialRow
    begin: float
    end: float


@dataclass(frozen=True)
class Lanes:
    """``seconds``: in which any worker was running; ``breaks``: starts after the first; ``sizes``: how many
    lanes each worker has, in their order."""

    lanes: list[list[Bar]]
    seconds: float
    breaks: list[float]
    sizes: list[int]

    @property
    def set_up(self) -> float:
        """Seconds until the first trial began."""
        return min(lane[0].begin for lane in self.lanes)

    @property
    def bounds(self) -> list[int]:
        """Before which lanes another worker's begin."""
        return list(accumulate(self.sizes))[:-1]

    @property
    def last(self) -> float:
        """When the last trial ended."""
        return max(lane[-1].end for lane in self.lanes)

    @property
    def busy(self) -> float:
        """The share of the lanes' time, from the first trial to the end of the last, that trials filled."""
        used = sum(bar.end - bar.begin for lane in self.lanes for bar in lane)
        whole = (self.last - self.set_up) * len(self.lanes)
        return min(1.0, used / whole) if whole > 0 else 0.0


def lanes_of(rows: Sequence[TrialRow], attributes: Mapping[str, str]) -> Lanes | None:
    """Return the lanes; None if no trial has times."""
    timed = [(row.began, row) for row in rows if row.began is not None]
    stored = json.loads(attributes.get("worked", "[]"))
    worked = [(float(begin), float(end)) for begin, end in stored]  # in which any worker was running
    if not timed or not worked:
        return None
    now = worked[-1][1]
    bars: dict[str, list[Bar]] = {}
    for began, row in sorted(timed, key=lambda pair: (pair[0], pair[1].number)):
        bar = Bar(row, at_work(began, worked), at_work(row.ended or now, worked))
        bars.setdefault(row.worker, []).append(bar)
    groups = [packed(own) for own in in_turn(bars.values())]
    starts = [sum(end - begin for begin, end in worked[:i]) for i in range(1, len(worked))]
    lanes = [lane for group in groups for lane in group]
    return Lanes(lanes, at_work(now, worked), starts, [len(group) for group in groups])


def packed(bars: Iterable[Bar]) -> list[list[Bar]]:
    """Return the bars, which are in the order of their beginning, in as few lanes as hold them."""
    lanes: list[list[Bar]] = []
    for bar in bars:
        free = next((lane for lane in lanes if lane[-1].end <= bar.begin), None)
        lanes.append([bar]) if free is None else free.append(bar)
    return lanes


def in_turn(workers: Iterable[list[Bar]]) -> list[list[Bar]]:
    """Return the bars of workers that ran at the same time apart, of workers after one another together."""
    places: list[list[Bar]] = []
    for own in workers:
        ended = (place for place in places if max(bar.end for bar in place) <= own[0].begin)
        free = next(ended, None)
        places.append(own) if free is None else free.extend(own)
    return places


def at_work(moment: float, worked: Sequence[Span]) -> float:
    """Return for how much of the time until then somebody was at work."""
    return sum(max(0.0, min(moment, end) - begin) for begin, end in worked)
