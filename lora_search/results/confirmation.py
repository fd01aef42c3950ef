"""The results of a confirmation, stored with its study as JSON in one attribute.

Each retraining is stored as it ends, the comparison of the settings at the end of all. Imports no torch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from lora_search.settings.schema import StudyConfig
from lora_search.study.stored_results import store_result

ATTRIBUTE = "confirmation"


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One trial's settings, trained once more with a fresh seed."""

    trial: int
    seed: int  # 1 for the first fresh seed, and so on: the same rows in the same order for all trials
    perplexity: float | None  # the best over its rungs, as a trial's; None if it diverged
    rung: int
    train_tokens: int
    train_seconds: float
    reason: str = ""  # why it diverged or stopped early


@dataclass(frozen=True, kw_only=True)
class Duel:
    """The leader against another trial: mean NLL over the same rows and seeds, the other's minus its own.

    ``row_error`` and ``seed_error`` are standard errors over rows and over seeds; ``critical`` is how many
    of the two together count as beyond doubt.
    """

    leader: int
    other: int
    difference: float
    row_error: float
    seed_error: float
    critical: float
    num_rows: int
    num_seeds: int

    @property
    def error(self) -> float:
        """The standard error of the difference: rows and seeds vary independently."""
        return math.hypot(self.row_error, self.seed_error)

    @property
    def is_sure(self) -> bool:
        return self.difference > self.critical * self.error

    @property
    def change(self) -> float:
        """How much higher the other's perplexity is, relative."""
        return math.expm1(self.difference)

    @property
    def change_error(self) -> float:
        return math.exp(self.difference) * self.error

    @property
    def rows_needed(self) -> int | None:
        """How many rows would separate the two if the difference is real; None if rows alone cannot."""
        return _needed(self.num_rows, self.row_error, self._wanted - self.seed_error**2)

    @property
    def seeds_needed(self) -> int | None:
        """The same for seeds."""
        return _needed(self.num_seeds, self.seed_error, self._wanted - self.row_error**2)

    @property
    def _wanted(self) -> float:
        return (self.difference / self.critical) ** 2  # the variance that would just do


def _needed(number: int, error: float, allowed: float) -> int | None:
    return max(number, math.ceil(number * error**2 / allowed)) if allowed > 0 else None


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """The results of one trial's fresh seeds. ``mean`` is the geometric mean of the finite perplexities."""

    trial: int
    perplexities: tuple[float, ...]
    num_diverged: int

    @property
    def num_seeds(self) -> int:
        return len(self.perplexities) + self.num_diverged

    @property
    def mean(self) -> float:
        return math.exp(float(np.log(self.perplexities).mean())) if self.perplexities else math.inf

    @property
    def spread(self) -> float | None:
        """The standard deviation between seeds, in perplexity; None for fewer than two."""
        return float(np.std(self.perplexities, ddof=1)) if len(self.perplexities) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """All retrainings so far, and the comparisons of the leader with the others."""

    repeats: tuple[Repeat, ...] = ()
    duels: tuple[Duel, ...] = ()
    confirmed_at: str = ""  # ISO 8601, UTC; empty until all that was asked for has been trained

    def fresh(self) -> list[Fresh]:
        """Return the results of each trial's seeds, the best mean first, diverged ones last."""
        found = []
        for trial in dict.fromkeys(repeat.trial for repeat in self.repeats):
            own = [repeat.perplexity for repeat in self.repeats if repeat.trial == trial]
            finite = tuple(perplexity for perplexity in own if perplexity is not None)
            found.append(Fresh(trial=trial, perplexities=finite, num_diverged=len(own) - len(finite)))
        return sorted(found, key=lambda fresh: (fresh.num_diverged > 0, fresh.mean, fresh.trial))


def read_confirmation(attributes: Mapping[str, str]) -> Confirmation:
    """Return the study's confirmation; an empty one if it has none."""
    stored = json.loads(attributes.get(ATTRIBUTE, "{}"))
    return Confirmation(
        repeats=tuple(Repeat(**repeat) for repeat in stored.get("repeats", ())),
        duels=tuple(Duel(**duel) for duel in stored.get("duels", ())),
        confirmed_at=stored.get("confirmed_at", ""),
    )


def store_confirmation(config: StudyConfig, confirmation: Confirmation) -> None:
    """Store the confirmation in the study, replacing an older one."""
    store_result(config, ATTRIBUTE, asdict(confirmation))
