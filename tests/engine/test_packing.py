import itertools

from lora_search.engine.packing import fill_pass


def test_slots_share_a_pass_evenly() -> None:
    assert fill_pass([[10] * 8, [10] * 8, [20] * 8], 80) == [3, 3, 1]


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    assert fill_pass([[100, 5], [100]], 50) == [1, 0]


def test_the_budget_holds_and_something_always_moves() -> None:
    queues = [[7, 3, 9], [], [30, 2], [1] * 5]
    for budget, order in itertools.product(range(8, 80), itertools.permutations(queues)):
        taken = fill_pass(order, budget)
        tokens = sum(sum(queue[:count]) for queue, count in zip(order, taken, strict=True))
        assert tokens <= budget or sum(taken) == 1
        assert sum(taken) >= 1
