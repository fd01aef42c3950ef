"""The settings that a trial may search: the adapters, the optimizer, the training loop."""

import re
from dataclasses import dataclass, field
from typing import Any, get_args

from lora_search.errors import ConfigError
from lora_search.settings.rules import require, require_choice, require_range
from lora_search.trial import MODULES, STARTS, Bias, Schedule

INITS = r"kaiming|gaussian|olora|pissa(_niter_[1-9]\d{0,2})?"
INITS_SHOWN = "kaiming, gaussian, olora, pissa or pissa_niter_N, such as pissa_niter_16"
INIT_REMEDY = "Write kaiming for PEFT's True; pissa and olora begin with factors of the base's weights"
OF_DATA = (
    "takes a pass over the data with the base for each trial. Use pissa, which begins with the weights' own"
)
NOT_OFFERED_INITS = {
    **dict.fromkeys(("eva", "corda", "lora_ga"), OF_DATA),
    "loftq": "quantizes the base anew for each trial, and all share one. Use pissa over a base that is not "
    "quantized, or kaiming with model.quantization=nf4",
}
BIAS_REMEDY = (
    "PEFT's all trains those of norms and of layers without adapters too, which all trials share: write "
    "lora_only, with lora.target_modules=all-linear for more layers"
)
ALL_LINEAR = "all-linear"
TRAIN_MOST = {  # anything larger is a typing error
    "epochs": 10_000, "evals_per_epoch": 10_000, "batch_size": 65_536, "gradient_accumulation_steps": 65_536,
}  # fmt: skip
MAX_ALPHA = 1_000_000  # alpha/r above some hundreds diverges at any learning rate
MAX_NORM = 1_000_000  # a larger gradient norm means that the trial has diverged
PATTERNS = ("lora.rank_pattern", "lora.alpha_pattern")  # mappings with keys of the user's own
ALL_TOKENS = "all_tokens"
MAX_LAYERS = 10_000
MAX_TOKEN = 10_000_000
MAX_TOKENS = 1024  # more than some special tokens: train on the whole embedding elsewhere
MAX_RANK = 4096  # the width of an 8B model: a rank above a layer's width adds nothing
MAX_STEPS = 1_000_000
SCHEDULES, BIASES = get_args(Schedule), get_args(Bias)
MAX_SEED = 2**32 - 1  # trials draw 32 bits, and PyTorch accepts them


@dataclass(kw_only=True)
class LoraConfig:
    r: int = 16
    alpha: int | float | str = "2r"  # a number, or a multiple of the rank: "2r", "0.5r", "r"
    dropout: float = 0.05
    target_modules: Any = field(default_factory=lambda: ["q_proj", "v_proj"])  # names, all-linear, or a regex
    layers_to_transform: Any = (
        None  # the decoder layers that carry adapters, from 0: 31 or [30, 31]; null: all
    )
    use_rslora: bool = False
    use_dora: bool = False  # DoRA: a trained magnitude for each output of an adapted layer
    trainable_token_indices: Any = None  # ids of tokens whose embeddings are trained too: [128002,128003]
    trainable_token_head: bool = False  # their rows of a head that is not tied to the embedding, too
    modules_to_save: Any = None  # copies that are trained whole: [embed_tokens,lm_head], or one of them
    bias: str = "none"  # lora_only: the biases of adapted layers that have one are trained too
    rank_pattern: Any = None  # other ranks, by the end of a layer's name: {q_proj: 32}
    alpha_pattern: Any = None
    init: str = "kaiming"  # of A, as PEFT's default; gaussian; of A and B: pissa, pissa_niter_16, olora

    def __post_init__(self) -> None:
        require(1 <= self.r <= MAX_RANK, "lora.r", self.r, f"must be in [1, {MAX_RANK}]", "Try 8, 16 or 32")
        self.alpha_for_rank(self.r)
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "must be in [0, 1)", "Try 0.05")
        is_init = re.fullmatch(INITS, self.init) is not None
        reason = NOT_OFFERED_INITS.get(self.init)
        remedy = f"{self.init} {reason}" if reason else INIT_REMEDY
        require(is_init, "lora.init", self.init, f"must be {INITS_SHOWN}", remedy)
        fits = not (self.use_dora and self.init.startswith(STARTS))
        rule = f"cannot be true with lora.init={self.init}"
        require(fits, "lora.use_dora", True, rule, "Set one of the two, or search one by when(...)")
        require(self.bias in BIASES, "lora.bias", self.bias, f"must be {' or '.join(BIASES)}", BIAS_REMEDY)
        _check_targets(self.target_modules)
        _check_layers(self.layers_to_transform)
        _check_ids(self.trainable_token_indices)
        has_ids, rule = (
            bool(self.trainable_token_indices),
            "must be false without lora.trainable_token_indices",
        )
        fits = has_ids or not self.trainable_token_head
        require(fits, "lora.trainable_token_head", True, rule, "Give their ids")
        _check_modules(self.modules_to_save)
        fits, rule = not (has_ids and self.modules_to_save), "cannot be set with lora.trainable_token_indices"
        remedy = (
            "A whole embedding has the rows of all tokens: set one of the two, or search one by when(...)"
        )
        require(fits, "lora.modules_to_save", self.modules_to_save, rule, remedy)
        for key in ("rank_pattern", "alpha_pattern"):
            _check_pattern(f"lora.{key}", getattr(self, key))
        for name, r in (self.rank_pattern or {}).items():
            rule = f"must give whole numbers in [1, {MAX_RANK}]"
            is_rank = isinstance(r, int) and 1 <= r <= MAX_RANK
            require(is_rank, "lora.rank_pattern", {name: r}, rule, "Write {q_proj: 32}")
        for name, alpha in (self.alpha_pattern or {}).items():
            rule = f"must give numbers above 0 and at most {MAX_ALPHA:,}"
            require(0 < alpha <= MAX_ALPHA, "lora.alpha_pattern", {name: alpha}, rule, "Write {q_proj: 64}")

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


def _check_targets(names: object) -> None:
    is_list = isinstance(names, list) and len(names) > 0 and all(isinstance(n, str) and n for n in names)
    is_name = (
        isinstance(names, str) and re.fullmatch(r"[\w.\s]*", names) is not None
    )  # it matches no full name
    is_text = names == ALL_LINEAR or (isinstance(names, str) and not is_name)
    rule = f"must be a list of layer names, {ALL_LINEAR} or a regular expression"
    require(is_list or is_text, "lora.target_modules", names, rule, "Write it as '[q_proj,v_proj]'")
    if isinstance(names, list):
        is_unique = len(set(names)) == len(names)
        require(is_unique, "lora.target_modules", names, "must name each layer once", "Remove the repeated")
    elif names != ALL_LINEAR:
        _check_regex("lora.target_modules", str(names))


def _check_layers(layers: object) -> None:
    numbers = layers if isinstance(layers, list) else [layers]
    is_count = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MAX_LAYERS for n in numbers)
    holds = layers is None or (len(numbers) > 0 and is_count and len(set(numbers)) == len(numbers))
    rule = "must be a layer's number from 0, or a list of different ones"
    require(holds, "lora.layers_to_transform", layers, rule, "Write '[30,31]'; null takes all layers")


def _check_ids(ids: object) -> None:
    if ids is None:
        return
    found = ids if isinstance(ids, list) and all(type(i) is int for i in ids) else None
    for holds, rule in (
        (found is not None and len(set(found)) == len(found), "must be a list of different token ids"),
        (all(0 <= i < MAX_TOKEN for i in found or []), f"must be ids from 0 to {MAX_TOKEN - 1:,}"),
        (len(found or []) <= MAX_TOKENS, f"must be at most {MAX_TOKENS} ids"),
    ):
        require(holds, "lora.trainable_token_indices", ids, rule, "Write '[128002,128003]'; null trains none")


def _check_modules(modules: object) -> None:
    known = isinstance(modules, list) and set(map(str, modules)) <= set(MODULES)
    rule = f"must be a list of {' and '.join(MODULES)}, as all other modules are shared by the trials"
    remedy = "Write '[embed_tokens,lm_head]'; adapt linear layers by lora.target_modules"
    require(modules is None or known, "lora.modules_to_save", modules, rule, remedy)
    is_unique = not isinstance(modules, list) or len(set(modules)) == len(modules)
    require(is_unique, "lora.modules_to_save", modules, "must name each module once", "Remove the repeated")


def _check_pattern(key: str, pattern: object) -> None:
    is_pattern = (
        pattern is None
        or isinstance(pattern, dict)
        and all(
            isinstance(k, str) and k and isinstance(v, int | float) and not isinstance(v, bool)
            for k, v in pattern.items()
        )
    )
    require(is_pattern, key, pattern, "must give numbers by the ends of layer names", "Write '{q_proj: 32}'")
    for name in pattern if isinstance(pattern, dict) else ():
        _check_regex(key, name)


def _check_regex(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        rule = f"must be a regular expression ({error})"
        raise ConfigError(key, pattern, rule, "Write the end of a layer's name: q_proj") from None


@dataclass(kw_only=True)
class OptimConfig:
    lr: float = 2e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: str = "cosine"  # or linear, constant, inverse_sqrt, wsd (warm-up, stable, linear decay)
    warmup_ratio: float = 0.05
    warmup_steps: int | None = None  # null: warmup_ratio decides
    min_lr_ratio: float = 0.0  # cosine, linear, wsd: where the rate ends, as a share of lr
    decay_ratio: float = 0.2  # wsd: the share of the steps in which the rate falls
    lora_plus_ratio: float = 1.0  # LoRA+: B's learning rate over A's
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, holds, rule, remedy in (
            ("lr", 0 < self.lr < 1, "must be between 0 and 1", "LoRA learns well around 2e-4"),
            ("weight_decay", 0 <= self.weight_decay < 1, "must be in [0, 1)", ""),
            ("beta1", 0 <= self.beta1 < 1, "must be in [0, 1)", ""),
            ("beta2", 0 <= self.beta2 < 1, "must be in [0, 1)", ""),
            ("eps", 0 < self.eps < 1, "must be between 0 and 1", ""),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "must be in [0, 1]", "Try 0.1"),
            ("decay_ratio", 0 < self.decay_ratio <= 1, "must be in (0, 1]", "Try 0.2"),
            ("lora_plus_ratio", 0 < self.lora_plus_ratio <= 1000, "must be above 0 and at most 1000",
             "Try 4 or 16"),
            ("warmup_ratio", 0 <= self.warmup_ratio <= 1, "must be in [0, 1]", ""),
            ("max_grad_norm", 0 < self.max_grad_norm <= MAX_NORM, f"must be above 0 and at most {MAX_NORM:,}",
             f"Try 1.0; {MAX_NORM:,} clips nothing"),
        ):  # fmt: skip
            require(holds, f"optim.{name}", getattr(self, name), rule, remedy)
        require_choice("optim.schedule", self.schedule, SCHEDULES)
        if self.warmup_steps is not None:
            remedy = "null: optim.warmup_ratio decides"
            require_range("optim.warmup_steps", self.warmup_steps, 0, MAX_STEPS, remedy)


@dataclass(kw_only=True)
class TrainConfig:
    epochs: int = 3
    evals_per_epoch: int = 4  # rungs per epoch
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    early_stopping_patience: int | None = None  # rungs without improvement; null trains to the end
    loss_on: str = "all_assistant_turns"  # of a conversation; or last_turn, or all_tokens, in training only
    neftune_alpha: float = 0.0  # NEFTune: noise on the embeddings while training, as in arXiv 2310.05914
    label_smoothing: float = 0.0  # in the training loss only; validation is plain NLL
    seed: int | None = None  # of adapter init and dropout; null draws one from `seed` and the trial's number

    def __post_init__(self) -> None:
        if self.seed is not None:
            require_range("train.seed", self.seed, 0, MAX_SEED, "null gives each trial a seed of its own")
        noise, rule = self.neftune_alpha, "must be 0 (no noise) or above, at most 1000"
        require(0 <= noise <= 1000, "train.neftune_alpha", noise, rule, "Try 5")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "train.label_smoothing", smoothing, "must be in [0, 1)", "Try 0.1")
        require_choice("train.loss_on", self.loss_on, ("all_assistant_turns", "last_turn", ALL_TOKENS))
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
