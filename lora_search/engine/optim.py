"""AdamW, clipping and learning-rate schedules for the rows of slots. No synchronisation with
the host.

Same arithmetic as torch.optim.AdamW, torch.nn.utils.clip_grad_norm_ and the schedules of transformers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_search.engine.row import Parts, Row
from lora_search.trial import TrialSettings

TIMESCALE = 10_000  # steps of inverse_sqrt without warm-up, as in transformers


def learning_rate(settings: TrialSettings, step: int, total_steps: int) -> float:
    """Return the rate of optimizer step ``step`` (0-based); warm-up starts at 0, as in transformers."""
    warmup_steps = settings.warmup_of(total_steps)
    if step < warmup_steps:
        return settings.lr * step / max(1, warmup_steps)
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "inverse_sqrt":
        timescale = warmup_steps or TIMESCALE
        return settings.lr / math.sqrt((step - warmup_steps) / timescale + 1.0)
    start = warmup_steps
    if settings.schedule == "wsd":
        start = max(start, total_steps - math.ceil(total_steps * settings.decay_ratio))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1.0 - progress
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * share)


@dataclass
class Moments:
    """What AdamW remembers of one slot's row."""

    exp_avg: Parts
    exp_avg_sq: Parts
    steps: int = 0


class SlotAdamW:
    """AdamW over the rows of slots, each with a step count of its own. The matrices B may have a rate of
    their own (LoRA+); biases have no weight decay, as in transformers."""

    def __init__(self, rows: Mapping[int, Row]) -> None:
        self.rows = rows
        self.moments: dict[int, Moments] = {}

    def reset(self, slot: int) -> None:
        """Begin with the row that the slot has now."""
        row = self.rows[slot]
        exp_avg, exp_avg_sq = ([torch.zeros_like(theta_P) for theta_P in row.theta] for _ in range(2))
        self.moments[slot] = Moments(exp_avg, exp_avg_sq)
        for grad in row.grad:
            grad.zero_()

    def release(self, slot: int) -> None:
        """Free the slot's memory."""
        self.moments.pop(slot, None)

    @torch.no_grad()
    def step(self, slot: int, settings: TrialSettings, lr: float) -> torch.Tensor:
        """Clip, update the slot's row, clear its gradient; return the gradient norm before clipping
        (scalar tensor)."""
        row, moments = self.rows[slot], self.moments[slot]
        grad_norm = total_norm(row.grad)
        clip = (settings.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        moments.steps += 1
        for part in range(len(row.theta)):
            _step_part(part, row, moments, settings, lr, clip)
        return grad_norm


def _step_part(
    part: int, row: Row, moments: Moments, settings: TrialSettings, lr: float, clip: torch.Tensor
) -> None:
    """Update what the slot has on one device, and clear its gradient."""
    grad, theta = row.grad[part], row.theta[part]
    exp_avg, exp_avg_sq = moments.exp_avg[part], moments.exp_avg_sq[part]
    grad.mul_(clip.to(grad.device, non_blocking=True))
    bias_correction1 = 1.0 - settings.beta1**moments.steps
    bias_correction2 = 1.0 - settings.beta2**moments.steps
    exp_avg.lerp_(grad, 1.0 - settings.beta1)
    exp_avg_sq.mul_(settings.beta2).addcmul_(grad, grad, value=1.0 - settings.beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(bias_correction2)).add_(settings.eps)
    for where, rate in _rates(settings, lr, row.layout.starts_of_b[part]):
        theta[: row.layout.starts_of_bias[part]][where].mul_(1.0 - rate * settings.weight_decay)
        theta[where].addcdiv_(exp_avg[where], denominator[where], value=-rate / bias_correction1)
    grad.zero_()


def total_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm over all tensors, on the device of the first."""
    norms: list[torch.Tensor] = [torch.linalg.vector_norm(grad) for grad in grads]
    if len(norms) == 1:
        return norms[0]
    together: torch.Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(grads[0].device, non_blocking=True) for norm in norms])
    )
    return together


def _rates(settings: TrialSettings, lr: float, start_of_b: int) -> Iterator[tuple[slice, float]]:
    """Yield where which learning rate holds: one, or with LoRA+ (arXiv 2402.12354) two."""
    if settings.lora_plus_ratio == 1.0:
        yield slice(None), lr
    else:
        yield slice(start_of_b), lr
        yield slice(start_of_b, None), lr * settings.lora_plus_ratio
