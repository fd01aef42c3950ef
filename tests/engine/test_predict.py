"""What a pass costs on a GPU, counted without one: it may not grow unseen."""

from dataclasses import replace

import pytest

from tests.benchmarks.predict import CASES, Count, count, parameters

ALL_LINEAR, Q_AND_V, QLORA = CASES[1], CASES[3], CASES[-1]  # 8B, eight slots; 70B in 4 bits


def of_layers(number: int, case: object = ALL_LINEAR) -> Count:
    shape = {**case.shape, "num_hidden_layers": number}  # type: ignore[attr-defined]
    return count(replace(case, shape=shape))  # type: ignore[type-var]


@pytest.fixture(scope="module")
def one() -> Count:
    return of_layers(1)


@pytest.fixture(scope="module")
def two() -> Count:
    return of_layers(2)


def test_a_layer_takes_no_more_kernels_and_keeps_no_more_bytes_than_it_did(one: Count, two: Count) -> None:
    assert two.total_kernels - one.total_kernels <= 77
    assert (two.kept_bytes - one.kept_bytes) / ALL_LINEAR.tokens <= 0.106 * 2**20
    assert sum(two.seconds.values()) - sum(one.seconds.values()) <= 12.1e-3


def test_the_count_of_matmuls_is_what_a_frozen_base_needs(one: Count, two: Count) -> None:
    layer = two.seconds["base matmul"] - one.seconds["base matmul"]
    shape = ALL_LINEAR.shape
    of_one = parameters(replace(ALL_LINEAR, shape={**shape, "num_hidden_layers": 1}))
    of_two = parameters(replace(ALL_LINEAR, shape={**shape, "num_hidden_layers": 2}))

    assert layer == pytest.approx(4 * (of_two - of_one) * ALL_LINEAR.tokens / 800e12, rel=0.01)


def test_q_and_v_alone_cost_less_than_all_layers(two: Count) -> None:
    narrow = of_layers(2, Q_AND_V)

    assert narrow.total_seconds < two.total_seconds
    assert narrow.kept_bytes < two.kept_bytes


def test_a_recomputed_layer_in_4_bits_keeps_its_input_and_is_unpacked_three_times() -> None:
    one, two = (of_layers(number, QLORA) for number in (1, 2))
    width, weights = 8192, 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)

    assert (two.kept_bytes - one.kept_bytes) / QLORA.tokens == 2 * width
    unpacking = two.seconds["unpacking"] - one.seconds["unpacking"]
    assert unpacking == pytest.approx(3 * weights * (0.5 + 2) / 3e12, rel=1e-3)
