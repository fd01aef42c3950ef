"""The frozen records that the rooms exchange: what to train, and what was measured.

A *rung* is a point on the data axis; rung k means "k / evals_per_epoch epochs of examples seen".
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

Schedule = Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"]
Pattern = tuple[tuple[str, int | float], ...]  # (end of a layer's name, as PEFT matches it; value)
PATTERN, LAYERS = "re:", "layers:"  # how target_modules writes a regular expression, and a limit to layers
MODULES = ("embed_tokens", "lm_head")  # embedding and head, whatever a model calls them
STARTS = ("pissa", "olora")  # how the names of initialisations begin whose product the base loses
Bias = Literal["none", "lora_only"]
EndReason = Literal["finished", "early_stopped", "diverged", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """Everything that determines a trial's curve, apart from the base model, the data and the seed."""

    r: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]  # names, "all-linear" or "re:" and a pattern; "layers:0,1" limits them
    use_rslora: bool
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    max_grad_norm: float
    schedule: Schedule
    warmup_ratio: float
    batch_size: int
    gradient_accumulation_steps: int
    epochs: int
    evals_per_epoch: int
    early_stopping_patience: int | None  # in rungs
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()
    init: str = "kaiming"
    use_dora: bool = False
    trainable_token_indices: tuple[int, ...] = ()
    trainable_token_head: bool = False  # these rows of a head that is not tied, too
    modules_to_save: tuple[str, ...] = ()  # embed_tokens, lm_head: each slot's own copy is trained
    bias: Bias = "none"  # or those of adapted layers are trained
    warmup_steps: int | None = None  # in place of warmup_ratio
    min_lr_ratio: float = 0.0
    decay_ratio: float = 0.2  # wsd: share of the steps in which the rate falls
    lora_plus_ratio: float = 1.0
    neftune_alpha: float = 0.0
    label_smoothing: float = 0.0

    @property
    def has_start(self) -> bool:
        """Whether the base loses the adapter's first value: PiSSA, OLoRA."""
        return self.init.startswith(STARTS)

    @property
    def trains_biases(self) -> bool:
        return self.bias != "none"

    @property
    def examples_per_step(self) -> int:
        """Examples in one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def num_rungs(self) -> int:
        return self.epochs * self.evals_per_epoch

    def warmup_of(self, total_steps: int) -> int:
        """Return how many optimizer steps the warm-up takes."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(total_steps * self.warmup_ratio)

    def record(self) -> dict[str, object]:
        """Return the settings for JSON, without those that have a default and are at it: records and digests
        stay as they were before there was such a setting."""
        optional = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {k: v for k, v in asdict(self).items() if k not in optional or v != optional[k]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "TrialSettings":
        """Return the settings that `record` gave, also after JSON. Raises TypeError."""
        return cls(**{key: _as_tuple(value) for key, value in record.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """One claimed trial: its number in the study, its seed, its settings and its folder."""

    number: int
    seed: int
    settings: TrialSettings
    folder: str  # absolute; contains adapter/ and checkpoint/
    study_id: str = ""  # of its study; empty without a study
    perplexities: Mapping[int, float] = field(default_factory=dict)  # by rung, already in the study
    order_seed: int | None = None  # of the order of the rows; None: the sweep's, the same for all its trials
    last_rung: int | None = None  # ends there, and keeps the adapter of that rung whatever it measures

    def kept_rung(self, known: Mapping[int, float]) -> int:
        """Return the rung whose adapter counts, of those with these perplexities; 0 if there is none."""
        if self.last_rung is not None:
            return max(known, default=0)
        return min(known, key=lambda rung: (known[rung], rung), default=0)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step of one trial."""

    examples_seen: int
    loss: float  # mean NLL per completion token of the effective batch, weighted as its rows are
    lr: float
    grad_norm: float  # before clipping


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The measurement of one trial at one rung, or at its end.

    ``validation_loss`` is the mean NLL over all completion tokens of the validation split, ``perplexity``
    its exp. Both are NaN at the last rung of a diverged trial, and for a failed trial, whose ``detail`` is
    the reason.
    """

    trial_number: int
    rung: int  # 1-based; the report step of the study
    examples_seen: int
    train_tokens: int  # tokens trained on since the trial began
    train_seconds: float  # this trial's share of the training time since its last rung
    tokens_per_second: float  # training throughput of the whole worker since this trial's last rung
    validation_loss: float
    perplexity: float
    best_rung: int  # the rung of the lowest perplexity so far; 0 if there is none
    best_perplexity: float
    steps: tuple[StepRecord, ...]  # the optimizer steps since the last rung
    ended: EndReason | None = None
    detail: str = ""  # why it ended, in words
    recovery: str = ""  # which problems its checkpoint had when it was resumed


@dataclass(frozen=True, eq=False)
class RowScores:
    """One adapter's, or the bare base's, scores of all rows of a split, in the split's order."""

    nll_R: np.ndarray  # float64: NLL summed over the row's completion tokens
    tokens_R: np.ndarray  # int64: number of these tokens

    @property
    def mean_nll(self) -> float:
        """NLL per completion token over all rows."""
        return float(self.nll_R.sum() / self.tokens_R.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL; infinity on overflow."""
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A trial to stop, with the reason."""

    trial_number: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class SlotView:
    """The current state of a slot, for display. None: not measured yet."""

    trial_number: int
    settings: TrialSettings
    rung: int  # rungs measured so far
    examples_seen: int
    next_rung_examples: int  # examples seen at the next rung
    loss: float | None  # training loss between the last two rungs
    perplexity: float | None  # at the last rung


@dataclass(frozen=True)
class Limit:
    """One limit of the budget, with the amount spent."""

    key: str
    spent: float
    limit: float
    unit: str

    @property
    def share(self) -> float:
        return self.spent / self.limit

    @property
    def is_reached(self) -> bool:
        return self.spent >= self.limit

    def __str__(self) -> str:
        return f"{_amount(self.spent)} of {_amount(self.limit)}{self.unit}"


def _amount(number: float) -> str:
    """Return a number for display: 0.052, 1.75, 120, 2,000,000."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """The progress of a study. ``finished`` counts COMPLETE and PRUNED trials over all starts and workers."""

    finished: int
    n_trials: int | None  # None: a budget ends the sweep
    complete: int
    pruned: int
    failed: int
    running: int
    best_number: int | None
    best_perplexity: float | None
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial's record in the study, for reports."""

    number: int
    state: str  # COMPLETE, PRUNED, FAIL, RUNNING or WAITING
    perplexity: float | None  # best over its rungs; None before the first
    best_rung: int | None
    params: dict[str, object]  # searched keys only, e.g. {"lora.r": 16}
    perplexities: dict[int, float]  # rung -> validation perplexity
    reason: str  # why it was pruned, stopped or failed; empty if it ran to the end
    examples_seen: int
    train_tokens: int
    train_seconds: float
    recovery: str = ""  # which problems its checkpoint had when it was resumed
    began: float | None = None  # epoch seconds; None before it begins
    ended: float | None = None
    worker: str = ""  # the process that trained it last
    metric: "AnswerScore | None" = None  # None: its answers were not scored
    is_paused: bool = False  # counts as PRUNED and may go on


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """How good a trial's generated answers are; the higher the better."""

    name: str
    score: float  # mean over the rows
    base: float  # the base's, on the same rows
    num_rows: int
    behind: tuple[float, float] | None  # the best trial's score minus its own, and the paired standard error
    chooses: bool  # whether the study chooses its winner by it


def draw_seed(*parts: int) -> int:
    """Return a seed derived from others, e.g. the sweep's and a trial's number; the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
