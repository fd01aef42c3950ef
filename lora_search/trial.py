"""The frozen records that cross borders: what to train, and what was measured. No library but the standard
one.

Words: a *rung* is a point on the data axis; rung k means "k / evals_per_epoch epochs of examples seen".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Schedule = Literal["cosine", "linear", "constant"]
EndReason = Literal["finished", "early_stopped", "diverged", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """Everything that decides a trial's curve, apart from the base model, the data and the seed."""

    r: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]  # ("all-linear",) means every linear layer of the decoder
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

    @property
    def examples_per_step(self) -> int:
        """Examples in one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def num_rungs(self) -> int:
        return self.epochs * self.evals_per_epoch


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """One claimed trial: its number in the study, its own seed, what it was given and where it keeps its
    files."""

    number: int
    seed: int
    settings: TrialSettings
    folder: str  # absolute; holds adapter/ and checkpoint/
    study_id: str = ""  # of the study that it belongs to; empty where it belongs to none
    perplexities: Mapping[int, float] = field(
        default_factory=dict
    )  # rung -> what the study has of it already
    order_seed: int | None = None  # of the order of the rows; None: the sweep's, the same for all its trials
    last_rung: int | None = None  # ends there, and keeps the adapter of that rung whatever it measures

    def kept_rung(self, known: Mapping[int, float]) -> int:
        """Return the rung whose adapter counts, of those with these perplexities; 0 where there is none."""
        if self.last_rung is not None:
            return max(known, default=0)
        return min(known, key=lambda rung: (known[rung], rung), default=0)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step of one trial."""

    examples_seen: int
    loss: float  # mean NLL per completion token of the effective batch
    lr: float
    grad_norm: float  # before clipping


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one trial measured at one rung, or where it ended.

    ``validation_loss`` is the mean NLL over all completion tokens of the validation split, ``perplexity``
    its exp. A diverged trial has no finite value at its last rung: ``validation_loss`` and ``perplexity``
    are NaN there. A failed one has measured nothing: NaN too, and ``detail`` is its reason.
    """

    trial_number: int
    rung: int  # 1-based; the report step of the study
    examples_seen: int
    train_tokens: int  # useful tokens trained on since the trial began
    train_seconds: float  # this trial's share of the training time since its last rung
    tokens_per_second: float  # training throughput of the whole worker since this trial's last rung
    validation_loss: float
    perplexity: float
    best_rung: int  # the rung of the lowest perplexity so far; 0 when there is none
    best_perplexity: float
    steps: tuple[StepRecord, ...]  # the optimizer steps since the last rung
    ended: EndReason | None = None
    detail: str = ""  # why it ended, for people
    recovery: str = ""  # what was wrong with the checkpoint that the trial went on from


@dataclass(frozen=True, eq=False)
class RowScores:
    """How well one adapter, or the bare base, predicts each row of a split, in the split's order."""

    nll_R: np.ndarray  # float64: NLL summed over the row's completion tokens
    tokens_R: np.ndarray  # int64: how many those are

    @property
    def mean_nll(self) -> float:
        """NLL per completion token over all rows."""
        return float(self.nll_R.sum() / self.tokens_R.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL; infinity where a float overflows."""
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A trial that the pruner stops, and why."""

    trial_number: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class SlotView:
    """What a slot is doing right now, for people to watch. None: not measured yet."""

    trial_number: int
    settings: TrialSettings
    rung: int  # rungs measured so far
    examples_seen: int
    next_rung_examples: int  # examples seen at the next rung
    loss: float | None  # training loss between the last two rungs
    perplexity: float | None  # at the last rung


@dataclass(frozen=True)
class Limit:
    """One limit, and how much of it is spent."""

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
    """Return a number as people write it: 0.052, 1.75, 120, 2,000,000."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """Where the study stands. ``finished`` counts COMPLETE and PRUNED trials, over all starts and workers."""

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
    """One trial as the study knows it, for reports."""

    number: int
    state: str  # COMPLETE, PRUNED, FAIL, RUNNING or WAITING
    perplexity: float | None  # best over its rungs; None before the first
    best_rung: int | None
    params: dict[str, object]  # searched keys only, e.g. {"lora.r": 16}
    perplexities: dict[int, float]  # rung -> validation perplexity
    reason: str  # why it was pruned, stopped or failed; empty when it ran to the end
    examples_seen: int
    train_tokens: int
    train_seconds: float
    recovery: str = ""  # what was wrong with the checkpoint that it went on from
    began: float | None = None  # epoch seconds; None before it begins
    ended: float | None = None


def draw_seed(*parts: int) -> int:
    """Return a seed made of others, e.g. the sweep's and a trial's number: the same wherever it is asked."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
