"""AdamW, clipping and learning-rate schedules for one slot's row of a flat bank. No synchronisation with
the host.

Same arithmetic as torch.optim.AdamW, torch.nn.utils.clip_grad_norm_ and the schedules of transformers.
"""

import math
from collections.abc import Iterator

import torch

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


class SlotAdamW:
    """AdamW over the rows of ``theta_SP`` (S slots, P parameters each); every slot has its own step count.
    From ``start_of_b`` on, a row holds the matrices B, which may have a rate of their own (LoRA+)."""

    def __init__(self, theta_SP: torch.Tensor, grad_SP: torch.Tensor, start_of_b: int = 0) -> None:
        self.theta_SP, self.grad_SP, self.start_of_b = theta_SP, grad_SP, start_of_b
        self.exp_avg_SP = torch.zeros_like(theta_SP)
        self.exp_avg_sq_SP = torch.zeros_like(theta_SP)
        self.steps = [0] * theta_SP.shape[0]

    def reset(self, slot: int) -> None:
        """Reset the slot's state."""
        self.grad_SP[slot].zero_()
        self.exp_avg_SP[slot].zero_()
        self.exp_avg_sq_SP[slot].zero_()
        self.steps[slot] = 0

    @torch.no_grad()
    def step(self, slot: int, settings: TrialSettings, lr: float) -> torch.Tensor:
        """Clip, update the slot's row, clear its gradient; return the gradient norm before clipping
        (scalar tensor)."""
        grad, theta = self.grad_SP[slot], self.theta_SP[slot]
        exp_avg, exp_avg_sq = self.exp_avg_SP[slot], self.exp_avg_sq_SP[slot]
        grad_norm: torch.Tensor = torch.linalg.vector_norm(grad)
        grad.mul_((settings.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        self.steps[slot] += 1
        bias_correction1 = 1.0 - settings.beta1 ** self.steps[slot]
        bias_correction2 = 1.0 - settings.beta2 ** self.steps[slot]
        exp_avg.lerp_(grad, 1.0 - settings.beta1)
        exp_avg_sq.mul_(settings.beta2).addcmul_(grad, grad, value=1.0 - settings.beta2)
        denominator = (exp_avg_sq.sqrt() / math.sqrt(bias_correction2)).add_(settings.eps)
        for part, rate in self._parts(settings, lr):
            theta[part].mul_(1.0 - rate * settings.weight_decay)
            theta[part].addcdiv_(exp_avg[part], denominator[part], value=-rate / bias_correction1)
        grad.zero_()
        return grad_norm

    def _parts(self, settings: TrialSettings, lr: float) -> Iterator[tuple[slice, float]]:
        """Yield the parts of a row with their learning rates: one, or with LoRA+ (arXiv 2402.12354) two."""
        if settings.lora_plus_ratio == 1.0:
            yield slice(None), lr
        else:
            yield slice(self.start_of_b), lr
            yield slice(self.start_of_b, None), lr * settings.lora_plus_ratio
