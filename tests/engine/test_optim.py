import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from lora_search.engine.optim import SlotAdamW, learning_rate
from lora_search.engine.row import Row, lay_out
from tests.conftest import SETTINGS, make_run

SCHEDULES = {
    "cosine": lambda o: get_cosine_schedule_with_warmup(o, 5, 20),
    "cosine with a floor": lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 5, 20, min_lr_rate=0.1),
    "linear": lambda o: get_linear_schedule_with_warmup(o, 5, 20),
    "constant": lambda o: get_constant_schedule_with_warmup(o, 5),
    "inverse_sqrt": lambda o: get_inverse_sqrt_schedule(o, 5),
    "wsd": lambda o: get_wsd_schedule(o, 5, 6, num_training_steps=20, decay_type="linear"),
}
CHANGES = {
    "cosine with a floor": {"schedule": "cosine", "min_lr_ratio": 0.1},
    "wsd": {"schedule": "wsd", "decay_ratio": 0.3},
}

ONE_PART = lay_out([], SETTINGS, {"rows": (10, 5)}, 1)


@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.25}, {"warmup_steps": 5}])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_those_of_transformers(tmp_path, name: str, warmup: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    settings = make_run(tmp_path, **{"schedule": name, **CHANGES.get(name, {}), **warmup}).settings
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.lr)
    reference = SCHEDULES[name](optimizer)

    for step in range(20):
        assert learning_rate(settings, step, 20) == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        reference.step()


def test_inverse_sqrt_without_warm_up_falls_slowly_as_in_transformers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    settings = make_run(tmp_path, schedule="inverse_sqrt", warmup_steps=0).settings
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.lr)
    reference = get_inverse_sqrt_schedule(optimizer, 0)

    for step in range(20):
        assert learning_rate(settings, step, 20) == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        reference.step()


def test_a_slot_steps_as_torch_adamw_and_leaves_the_others_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    settings = make_run(tmp_path, weight_decay=0.1, max_grad_norm=0.5).settings
    rows = {slot: Row(ONE_PART, *([torch.randn(50)] for _ in range(3)), []) for slot in range(3)}
    before = {slot: row.theta[0].clone() for slot, row in rows.items()}
    reference = before[1].clone().requires_grad_()
    ours = SlotAdamW(rows)
    for slot in rows:
        ours.reset(slot)
    theirs = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.1)

    for _ in range(5):
        gradient = torch.randn(50)
        rows[1].grad[0].copy_(gradient)
        reference.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([reference], 0.5)
        theirs.step()
        assert ours.step(1, settings, 0.01) == pytest.approx(norm.item())

    torch.testing.assert_close(rows[1].theta[0], reference.detach(), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(rows[slot].theta[0], before[slot]) for slot in (0, 2))
