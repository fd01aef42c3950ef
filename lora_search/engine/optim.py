"""AdamW, clipping and learning-rate schedules for one slot's row of a flat bank. No synchronisation with
the host.

Same arithmetic as torch.optim.AdamW, torch.nn.utils.clip_grad_norm_ and the schedules of transformers.
"""

import math
from collections.abc import Iterator, Sequence

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
    """AdamW over the rows of ``theta``, one tensor [S slots, P parameters] on each device; every slot has its
    own step count. From ``starts_of_b`` on, the parts of a row hold the matrices B, which may have a rate of
    their own (LoRA+)."""

    def __init__(
        self, theta: Sequence[torch.Tensor], grad: Sequence[torch.Tensor], starts_of_b: Sequence[int]
    ) -> None:
        self.theta, self.grad, self.starts_of_b = theta, grad, starts_of_b
        self.exp_avg = [torch.zeros_like(theta_SP) for theta_SP in theta]
        self.exp_avg_sq = [torch.zeros_like(theta_SP) for theta_SP in theta]
        self.steps = [0] * len(theta[0])

    def reset(self, slot: int) -> None:
        """Reset the slot's state."""
        for bank_SP in (*self.grad, *self.exp_avg, *self.exp_avg_sq):
            bank_SP[slot].zero_()
        self.steps[slot] = 0

    @torch.no_grad()
    def step(self, slot: int, settings: TrialSettings, lr: float) -> torch.Tensor:
        """Clip, update the slot's row, clear its gradient; return the gradient norm before clipping
        (scalar tensor)."""
        grad_norm = total_norm([grad_SP[slot] for grad_SP in self.grad])
        clip = (settings.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        self.steps[slot] += 1
        for part in range(len(self.theta)):
            self._step_part(part, slot, settings, lr, clip)
        return grad_norm

    def _step_part(
        self, part: int, slot: int, settings: TrialSettings, lr: float, clip: torch.Tensor
    ) -> None:
        """Update what the slot has on one device, and clear its gradient."""
        grad, theta = self.grad[part][slot], self.theta[part][slot]
        exp_avg, exp_avg_sq = self.exp_avg[part][slot], self.exp_avg_sq[part][slot]
        grad.mul_(clip.to(grad.device, non_blocking=True))
        bias_correction1 = 1.0 - settings.beta1 ** self.steps[slot]
        bias_correction2 = 1.0 - settings.beta2 ** self.steps[slot]
        exp_avg.lerp_(grad, 1.0 - settings.beta1)
        exp_avg_sq.mul_(settings.beta2).addcmul_(grad, grad, value=1.0 - settings.beta2)
        denominator = (exp_avg_sq.sqrt() / math.sqrt(bias_correction2)).add_(settings.eps)
        for where, rate in _rates(settings, lr, self.starts_of_b[part]):
            theta[where].mul_(1.0 - rate * settings.weight_decay)
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
