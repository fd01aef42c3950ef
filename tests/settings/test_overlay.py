"""What one trial trains with: its seed."""

import pytest

from lora_search.errors import ConfigError
from lora_search.settings.composition import compose
from lora_search.settings.overlay import trial_seed
from lora_search.settings.schema import SweepConfig, TrainConfig
from lora_search.trial import draw_seed


def test_each_trial_draws_a_seed_of_its_own_unless_one_is_given() -> None:
    free, fixed = SweepConfig(seed=3), SweepConfig(seed=3, train=TrainConfig(seed=7))

    assert [trial_seed(free, {}, number) for number in (0, 1)] == [draw_seed(3, 0), draw_seed(3, 1)]
    assert [trial_seed(fixed, {}, number) for number in (0, 1)] == [7, 7]
    assert trial_seed(fixed, {"train.seed": 8, "lora.r": 4}, 0) == 8


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match="train.seed: must be at"):
        compose("smoke", [f"train.seed={seed}"])
