"""What a study's trials are to freeze-thaw, and that its decisions depend on nothing else."""

import math
from collections.abc import Mapping, Sequence

import pytest
from optuna.trial import FrozenTrial, TrialState

from lora_search.search.priors import prior_rates
from lora_search.search.thawing import NEW, Memory, Thaw
from lora_search.search.trials import PROGRESS
from lora_search.settings.schema import PrunerConfig, SweepConfig, TrainConfig
from lora_search.settings.space import parse_space

WIDTH = 576.0
SPACE = {"lora": {"r": "choice(8, 16, 32)"}, "optim": {"lr": "tag(log, interval(1e-5, 1e-1))"}}
RUNGS = 4
RUNNING, PRUNED, COMPLETE = TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE


def make_thaw(
    space: Mapping[str, object] = SPACE, width: float | None = WIDTH, kept: list[list[float]] | None = None
) -> Thaw:
    kept = [] if kept is None else kept
    train = TrainConfig(epochs=1, evals_per_epoch=RUNGS)
    config = SweepConfig(train=train, space=dict(space), pruner=PrunerConfig(name="freeze_thaw"))
    return Thaw(config, parse_space(config), width, Memory(lambda: kept[-1] if kept else None, kept.append))


def make_trial(
    number: int, values: Sequence[float], state: TrialState = PRUNED, lr: float = 1e-3, reason: str = "",
    bare: int = 0, **params: object,
) -> FrozenTrial:  # fmt: skip
    return FrozenTrial(
        number=number, trial_id=number, state=state, value=None, datetime_start=None, datetime_complete=None,
        params={"optim.lr": lr, "lora.r": 8, **params}, distributions={}, user_attrs={"reason": reason},
        system_attrs={PROGRESS: {"untrained_rung": bare}},
        intermediate_values={rung: v for rung, v in enumerate(values, 1) if math.isfinite(v)},
    )  # fmt: skip


def some_trials() -> list[FrozenTrial]:
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 1e-4)
    return [make_trial(i, [30 - i, 28 - i][: 1 + i % 2], lr=lr) for i, lr in enumerate(rates)]


def test_the_promise_is_that_of_the_rate_from_which_the_first_trials_are_computed() -> None:
    middle = prior_rates(WIDTH)[0]

    promises = [
        make_thaw()._promise({"optim.lr": middle * factor}) for factor in (1, math.exp(1.5), 1 / 1000)
    ]

    assert promises == pytest.approx([1, math.exp(-0.5), 0], abs=1e-3)


@pytest.mark.parametrize(("space", "width"), [({"lora": SPACE["lora"]}, WIDTH), (SPACE, None)])
def test_without_a_searched_rate_or_a_known_width_nothing_is_promised(
    space: Mapping[str, object], width: float | None
) -> None:
    thaw = make_thaw(space, width)

    assert {thaw._promise({"optim.lr": lr}) for lr in (1e-4, 1e-3)} == {0.0}
    chosen = thaw.choose([make_trial(i, [30 - i, 29 - i]) for i in range(3)], [0, 1, 2], 2, 10, 3)
    assert len(chosen) == 2


def test_a_curve_has_no_value_where_the_base_was_measured_and_the_worst_where_it_diverged() -> None:
    thaw, e = make_thaw(), math.e

    bare = thaw._curve(make_trial(0, [e**3, e**2], bare=1))
    diverged = thaw._curve(make_trial(1, [e**3], reason="diverged: loss not finite"))
    missing = thaw._curve(make_trial(2, [e**3, math.inf, e**2]))

    assert bare.values == [pytest.approx(math.nan, nan_ok=True), pytest.approx(2)]
    assert diverged.values == pytest.approx([3, math.inf])
    assert missing.values == pytest.approx([3, math.nan, 2], nan_ok=True)


def test_a_complete_trial_has_ended_also_where_it_ended_early() -> None:
    thaw = make_thaw({**SPACE, "train": {"epochs": "choice(1, 3)"}})

    lengths = [
        thaw._curve(make_trial(0, [9, 8], state, **{"train.epochs": epochs})).length
        for state, epochs in ((PRUNED, 1), (PRUNED, 3), (COMPLETE, 3))
    ]

    assert lengths == [RUNGS, 3 * RUNGS, 2]


def test_as_long_as_nothing_is_known_all_go_on_and_new_ones_come_after_them() -> None:
    thaw = make_thaw()

    chosen = thaw.choose([make_trial(0, [], RUNNING), make_trial(1, [9.0], RUNNING)], [0, 1], 4, 5, 2)

    assert chosen[:2] == [0, 1]
    assert len({str(point) for point in chosen[2:]}) == 2
    assert all(isinstance(point, Mapping) for point in chosen[2:])


def test_a_decision_does_not_depend_on_the_order_of_the_trials_or_on_which_are_known_to_have_ended() -> None:
    trials, decisions = some_trials(), []
    for ended, others in ((trials[:2], trials[2:]), (trials[1::-1], trials[:1:-1]), ([], trials)):
        thaw = make_thaw()
        for trial in ended:
            thaw.add(trial)
        decisions.append(thaw.choose(others, [t.number for t in others if t.number > 1], 4, 10, 5))

    assert decisions[0] == decisions[1] == decisions[2]
    assert len(decisions[0]) == 4


def test_a_worker_that_starts_anew_decides_as_the_one_before_would_have() -> None:
    trials, kept = some_trials(), list[list[float]]()
    before = make_thaw(kept=kept)
    before.choose(trials[:4], [0, 1], 2, 10, 4)

    anew = make_thaw(kept=[*kept])
    decisions = [thaw.choose(trials, [0, 1, 2], 3, 10, 5) for thaw in (before, anew)]

    assert len(kept) >= 1
    assert decisions[0] == decisions[1]


def test_without_room_no_new_trial_is_chosen_and_a_tried_point_never() -> None:
    space = {"lora": {"r": "choice(8, 16, 32)"}, "train": {"batch_size": "choice(4, 8)"}}
    thaw = make_thaw(space)
    points = [{"lora.r": r, "train.batch_size": b} for r in (8, 16, 32) for b in (4, 8)]
    trials = [make_trial(i, [30 - i, 29 - i], **point) for i, point in enumerate(points[:5])]
    for trial in trials:
        del trial.params["optim.lr"]

    assert [p for p in thaw.choose(trials, [], NEW, 10, 5) if isinstance(p, Mapping)] == [points[5]]
    assert all(isinstance(one, int) for one in thaw.choose(trials, range(5), 4, 0, 5))
