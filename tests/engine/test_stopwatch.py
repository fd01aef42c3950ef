"""Laps on the CPU's clock; on a GPU they are events of its stream."""

import torch

from lora_search.ops.device import Lap, Throughput

CPU = torch.device("cpu")


def lap_of(seconds: float) -> Lap:
    lap = Lap([CPU])
    lap._start, lap._stop = 10.0, 10.0 + seconds
    return lap


def test_the_rate_is_that_of_all_tokens_over_all_time() -> None:
    throughput = Throughput()
    assert throughput.tokens_per_second == 0.0

    throughput.note(lap_of(1.0), 100)
    throughput.note(lap_of(3.0), 700)

    assert throughput.tokens_per_second == 200.0


def test_a_lap_ends_where_it_is_stopped() -> None:
    lap = Lap([CPU])
    torch.ones(200, 200) @ torch.ones(200, 200)
    lap.stop()

    assert lap.is_over
    assert lap.seconds == lap.seconds > 0.0
