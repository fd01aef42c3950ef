import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lora_search.engine.optim import SlotAdamW, learning_rate
from tests.conftest import make_run


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_equal_those_of_transformers(tmp_path, schedule: str) -> None:  # type: ignore[no-untyped-def]
    settings = make_run(tmp_path, schedule=schedule, warmup_ratio=0.25).settings
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.lr)
    reference = {
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, 5, 20),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, 5, 20),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, 5),
    }[schedule]()

    for step in range(20):
        assert learning_rate(settings, step, 20) == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        reference.step()


def test_a_slot_steps_as_torch_adamw_and_leaves_the_others_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    settings = make_run(tmp_path, weight_decay=0.1, max_grad_norm=0.5).settings
    theta, grad = torch.randn(3, 50), torch.zeros(3, 50)
    before, reference = theta.clone(), theta[1].clone().requires_grad_()
    ours = SlotAdamW(theta, grad)
    theirs = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.1)

    for _ in range(5):
        gradient = torch.randn(50)
        grad[1], reference.grad = gradient, gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([reference], 0.5)
        theirs.step()
        assert ours.step(1, settings, 0.01) == pytest.approx(norm.item())

    torch.testing.assert_close(theta[1], reference.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(theta[[0, 2]], before[[0, 2]])
