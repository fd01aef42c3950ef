"""The settings that a trial may search: the adapters, the optimizer, the training loop."""

import re
from dataclasses import dataclass, field
from typing import Any

from lora_search.settings.rules import require, require_choice, require_range

ALL_LINEAR = "all-linear"
TRAIN_MOST = {  # anything larger is a typing error
    "epochs": 10_000, "evals_per_epoch": 10_000, "batch_size": 65_536, "gradient_accumulation_steps": 65_536,
}  # fmt: skip
MAX_ALPHA = 1_000_000  # alpha/r above some hundreds diverges at any learning rate
MAX_NORM = 1_000_000  # a larger gradient norm means that the trial has diverged
MAX_RANK = 4096  # the width of an 8B model: a rank above a layer's width adds nothing
MAX_SEED = 2**32 - 1  # trials draw 32 bits, and PyTorch accepts them


@dataclass(kw_only=True)
class LoraConfig:
    r: int = 16
    alpha: int | float | str = "2r"  # a number, or a multiple of the rank: "2r", "0.5r", "r"
    dropout: float = 0.05
    target_modules: Any = field(default_factory=lambda: ["q_proj", "v_proj"])  # list of names, or all-linear
    use_rslora: bool = False

    def __post_init__(self) -> None:
        require(1 <= self.r <= MAX_RANK, "lora.r", self.r, f"must be in [1, {MAX_RANK}]", "Try 8, 16 or 32")
        self.alpha_for_rank(self.r)
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "must be in [0, 1)", "Try 0.05")
        names = self.target_modules
        is_list = isinstance(names, list) and len(names) > 0 and all(isinstance(n, str) and n for n in names)
        require(
            is_list or names == ALL_LINEAR,
            "lora.target_modules",
            names,
            f"must be a list of layer names or {ALL_LINEAR}",
            "Write it as '[q_proj,v_proj]'",
        )
        is_unique = not is_list or len(set(names)) == len(names)
        require(is_unique, "lora.target_modules", names, "must name each layer once", "Remove the repeated")

    def alpha_for_rank(self, r: int) -> float:
        """Return alpha as a number: "2r" at rank 8 is 16."""
        tied = re.fullmatch(r"(\d*\.?\d*)r", self.alpha) if isinstance(self.alpha, str) else None
        try:
            value = float(tied[1] or 1) * r if tied else float(self.alpha)
        except ValueError:
            value = float("nan")
        rule, remedy = "must be a number > 0 or a multiple of r", 'Try "2r"'
        require(0 < value < float("inf"), "lora.alpha", self.alpha, rule, remedy)
        require(value <= MAX_ALPHA, "lora.alpha", self.alpha, f"must be at most {MAX_ALPHA:,}", remedy)
        return value


@dataclass(kw_only=True)
class OptimConfig:
    lr: float = 2e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: str = "cosine"
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        require(
            0 < self.lr < 1, "optim.lr", self.lr, "must be between 0 and 1", "LoRA learns well around 2e-4"
        )
        require(0 <= self.weight_decay < 1, "optim.weight_decay", self.weight_decay, "must be in [0, 1)")
        require(0 <= self.beta1 < 1, "optim.beta1", self.beta1, "must be in [0, 1)")
        require(0 <= self.beta2 < 1, "optim.beta2", self.beta2, "must be in [0, 1)")
        require(0 < self.eps < 1, "optim.eps", self.eps, "must be between 0 and 1")
        require_choice("optim.schedule", self.schedule, ("cosine", "linear", "constant"))
        require(0 <= self.warmup_ratio <= 1, "optim.warmup_ratio", self.warmup_ratio, "must be in [0, 1]")
        rule = f"must be above 0 and at most {MAX_NORM:,}"
        remedy = f"Try 1.0; {MAX_NORM:,} clips nothing"
        require(0 < self.max_grad_norm <= MAX_NORM, "optim.max_grad_norm", self.max_grad_norm, rule, remedy)


@dataclass(kw_only=True)
class TrainConfig:
    epochs: int = 3
    evals_per_epoch: int = 4  # rungs per epoch
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    early_stopping_patience: int | None = None  # rungs without improvement; null trains to the end
    loss_on: str = "all_assistant_turns"  # of a conversation; or last_turn
    seed: int | None = None  # of adapter init and dropout; null draws one from `seed` and the trial's number

    def __post_init__(self) -> None:
        if self.seed is not None:
            require_range("train.seed", self.seed, 0, MAX_SEED, "null gives each trial a seed of its own")
        require_choice("train.loss_on", self.loss_on, ("all_assistant_turns", "last_turn"))
        for key, most in TRAIN_MOST.items():
            require_range(f"train.{key}", getattr(self, key), 1, most)
        examples = self.batch_size * self.gradient_accumulation_steps
        remedy = "An optimizer step cannot have more examples than the data"
        require_range("train.batch_size x train.gradient_accumulation_steps", examples, 1, 1_000_000, remedy)
        rungs = self.epochs * self.evals_per_epoch
        remedy = "Each is an evaluation and a row in the database: use fewer epochs or evaluations"
        require_range("train.epochs x train.evals_per_epoch", rungs, 1, 100_000, remedy)
        patience = self.early_stopping_patience
        if patience is not None:
            remedy = "null trains to the end"
            require_range("train.early_stopping_patience", patience, 1, 100_000, remedy)
