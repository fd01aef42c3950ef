"""What a study refuses to be continued with, and what it takes."""

from collections.abc import Mapping

import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lora_search.errors import FingerprintError
from lora_search.settings.schema import PrunerConfig, SweepConfig
from lora_search.settings.space import Space
from lora_search.study.fingerprint import check_fingerprint, settings_part, space_part
from lora_search.study.identity import Identity
from lora_search.study.opening_checks import keep_rule

LR = FloatDistribution(1e-4, 1e-3, log=True)
RANK = IntDistribution(8, 32, step=8)
ALL = {**settings_part(SweepConfig()), "data_hash": "x", "content.train": "y"}
CHOICE = CategoricalDistribution([4, 8])


class Study:
    """What a study keeps: its fingerprint, as `SweepStudy.open` does."""

    def __init__(self) -> None:
        self.stored: dict[str, str] = {}

    def check(self, settings: Mapping[str, str], distributions: Mapping[str, BaseDistribution]) -> list[str]:
        wanted = {**settings, **space_part(Space(dict(distributions), {}))}
        changes = check_fingerprint("faq", self.stored or wanted, wanted)
        self.stored = wanted
        return changes


@pytest.fixture
def study() -> Study:
    return Study()


def begin(study: Study, distributions: Mapping[str, BaseDistribution]) -> list[str]:
    return study.check(ALL, distributions)


def test_the_same_settings_go_on(study: Study) -> None:
    assert begin(study, {"optim.lr": LR, "lora.r": RANK}) == []
    assert begin(study, {"lora.r": RANK, "optim.lr": LR}) == []


def test_every_changed_key_is_named_with_the_ways_out(study: Study) -> None:
    begin(study, {"optim.lr": LR})

    with pytest.raises(FingerprintError) as caught:
        study.check({**ALL, "seed": "1", "train.epochs": "5"}, {"optim.lr": LR})

    lines = str(caught.value).splitlines()
    assert lines[0] == "study.name: 'faq' was started with other settings or inputs:"
    assert lines[1:3] == ["  seed: 0 -> 1", "  train.epochs: 3 -> 5"]
    assert lines[3].startswith("Choose a new study.name, or restore these. Free to change: study.*")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (LR, FloatDistribution(1e-5, 1e-3, log=True), "0.0001 to 0.001, log -> 1e-05 to 0.001, log"),
        (LR, FloatDistribution(1e-4, 1e-2, log=True), "0.0001 to 0.001, log -> 0.0001 to 0.01, log"),
        (RANK, IntDistribution(8, 64, step=8), "8 to 32 in steps of 8 -> 8 to 64 in steps of 8"),
        (CHOICE, CategoricalDistribution([2, 8, 4]), "choice of 4, 8 -> choice of 2, 8, 4"),
    ],
)
def test_a_range_may_widen_and_choices_be_added_and_then_they_hold(
    study: Study, old: BaseDistribution, new: BaseDistribution, words: str
) -> None:
    begin(study, {"key": old})

    assert begin(study, {"key": new}) == [f"space.key: {words}"]
    assert begin(study, {"key": new}) == []
    with pytest.raises(FingerprintError, match="may widen \\(not narrow\\).*\\(none taken out\\)"):
        begin(study, {"key": old})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (CHOICE, CategoricalDistribution([4, 16])),
        (CHOICE, IntDistribution(4, 8)),
        (LR, FloatDistribution(1e-4, 1e-2)),
        (RANK, IntDistribution(8, 64, step=4)),
        (RANK, IntDistribution(4, 36, step=8)),
        (RANK, FloatDistribution(8, 64, step=8)),
    ],
)
def test_other_choices_scales_and_steps_are_refused(
    study: Study, old: BaseDistribution, new: BaseDistribution
) -> None:
    begin(study, {"key": old})

    with pytest.raises(FingerprintError, match=r"space.key: .* -> .*\n.*none taken out"):
        begin(study, {"key": new})


def test_a_key_that_is_newly_searched_or_no_longer_is_refused(study: Study) -> None:
    begin(study, {"optim.lr": LR})

    with pytest.raises(FingerprintError, match=r"space.lora.r: not set -> 8 to 32 in steps of 8"):
        begin(study, {"optim.lr": LR, "lora.r": RANK})
    with pytest.raises(FingerprintError, match=r"space.optim.lr: 0.0001 to 0.001, log -> not set"):
        begin(study, {})


@pytest.mark.parametrize(
    ("pruner", "stored", "factor"),
    [
        (PrunerConfig(), None, 2),
        (PrunerConfig(), {"pruner.reduction_factor": "3"}, 3),
        (PrunerConfig(), {}, 3),  # before there were fingerprints
        (PrunerConfig(reduction_factor=4), {"pruner.reduction_factor": "3"}, 4),  # refused with a message
        (PrunerConfig(name="hyperband"), None, 3),
    ],
)
def test_a_study_keeps_the_reduction_factor_of_its_first_start(
    pruner: PrunerConfig, stored: dict[str, str] | None, factor: int
) -> None:
    identity = None if stored is None else Identity(id="id", fingerprint=stored)

    keep_rule(pruner, identity)

    assert settings_part(SweepConfig(pruner=pruner))["pruner.reduction_factor"] == str(factor)
