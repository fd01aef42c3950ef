"""AdamW, clipping and learning-rate schedules for one slot's row of a flat bank. No synchronisation with
the host.

Same arithmetic as torch.optim.AdamW, torch.nn.utils.clip_grad_norm_ and the schedules of transformers.
"""

import math

import torch

from lora_search.trial import TrialSettings


def learning_rate(settings: TrialSettings, step: int, total_steps: int) -> float:
    """Return the rate of optimizer step ``step`` (0-based); warm-up starts at 0, as in transformers."""
    warmup_steps = math.ceil(total_steps * settings.warmup_ratio)
    if step < warmup_steps:
        return settings.lr * step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if settings.schedule == "cosine":
        return settings.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if settings.schedule == "linear":
        return settings.lr * max(0.0, 1.0 - progress)
    return settings.lr


class SlotAdamW:
    """AdamW over the rows of ``theta_SP`` (S slots, P parameters each); every slot has its own step count."""

    def __init__(self, theta_SP: torch.Tensor, grad_SP: torch.Tensor) -> None:
        self.theta_SP, self.grad_SP = theta_SP, grad_SP
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
        theta.mul_(1.0 - lr * settings.weight_decay)
        exp_avg.lerp_(grad, 1.0 - settings.beta1)
        exp_avg_sq.mul_(settings.beta2).addcmul_(grad, grad, value=1.0 - settings.beta2)
        denominator = (exp_avg_sq.sqrt() / math.sqrt(bias_correction2)).add_(settings.eps)
        theta.addcdiv_(exp_avg, denominator, value=-lr / bias_correction1)
        grad.zero_()
        return grad_norm
