"""The certainty of a ranking: paired standard errors from the NLL of each validation row.

Two trials see the same rows, so their difference varies far less than either value. A mean over tokens is a
ratio of sums over rows; its standard error is the linearised one, with rows as clusters (Cochran, Sampling
Techniques, chapter 6).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_search.files.row_scores import BASE, read_scores
from lora_search.results.ranking import best_of
from lora_search.trial import RowScores, TrialRow

SURE = 2.0  # standard errors: 95 % where errors are normal
SAME_VALUE = 1e-3  # relative: the study's value and the sum of the rows, measured again after a restart


@dataclass(frozen=True)
class Comparison:
    """One trial's mean NLL minus another's on the same rows, with its standard error."""

    difference: float
    error: float
    num_rows: int

    @property
    def is_tied(self) -> bool:
        """Whether the difference is within two standard errors."""
        return abs(self.difference) <= SURE * self.error

    @property
    def change(self) -> float:
        """The difference in perplexity, relative: 0.012 is 1.2 % worse."""
        return math.expm1(self.difference)

    @property
    def change_error(self) -> float:
        """The standard error of the change."""
        return math.exp(self.difference) * self.error

    @property
    def interval(self) -> str:
        """The 95 % interval of the change, in words."""
        low, high = (100 * (self.change + sign * SURE * self.change_error) for sign in (-1, 1))
        return f"95 % interval {low:+.1f} to {high:+.1f} %"

    @property
    def rows_needed(self) -> int | None:
        """How many such rows would separate the two if the difference is real; None if it is 0."""
        if self.difference == 0 or self.error == 0:
            return None
        return math.ceil(self.num_rows * (SURE * self.error / self.difference) ** 2)


def compare(scores: RowScores, reference: RowScores) -> Comparison | None:
    """Return how the scores differ from the reference; None unless both are of the same two rows or more."""
    tokens_R = scores.tokens_R
    if not np.array_equal(tokens_R, reference.tokens_R) or len(tokens_R) < 2:
        return None
    excess_R = scores.nll_R - reference.nll_R
    difference = float(excess_R.sum() / tokens_R.sum())
    residual_R = excess_R - difference * tokens_R
    num_rows = len(tokens_R)
    variance = float((residual_R**2).sum()) * num_rows / (num_rows - 1)
    error = math.sqrt(variance) / float(tokens_R.sum())
    return Comparison(difference, error, num_rows) if math.isfinite(difference + error) else None


@dataclass(frozen=True)
class Certainty:
    """The certainty of a study's ranking. Empty if there are no row scores, as in an older study."""

    against_best: Mapping[int, Comparison] = field(default_factory=dict)  # trial -> with the best trial
    against_base: Mapping[int, Comparison] = field(default_factory=dict)

    def is_tied(self, row: TrialRow) -> bool:
        """Whether a COMPLETE trial is within two standard errors of the best; never the best itself."""
        comparison = self.against_best.get(row.number)
        return row.state == "COMPLETE" and comparison is not None and comparison.is_tied

    def tied(self, rows: Sequence[TrialRow]) -> list[TrialRow]:
        return [row for row in rows if self.is_tied(row)]

    def decimals(self, perplexity: float) -> int | None:
        """Return to which decimal place perplexities near this one can be told apart: the first digit of the
        smallest standard error between two trials, or else to the base. None: the rows say nothing."""
        errors = [c.error for c in (self.against_best or self.against_base).values() if c.error > 0]
        smallest = min(errors, default=0.0) * perplexity
        return max(0, math.ceil(-math.log10(smallest))) if 0 < smallest < math.inf else None


def certainty_of(rows: Sequence[TrialRow], folder: Path) -> Certainty:
    """Return the certainty from the files in the study's folder. About 0.5 ms per trial."""
    found = {row.number: scores for row in rows if (scores := _scores_of(row, folder)) is not None}
    best, base = best_of(rows), read_scores(folder, BASE)
    to_best = found.get(best.number) if best is not None else None
    others = {number: scores for number, scores in found.items() if best and number != best.number}
    return Certainty(
        against_best=_compare_all(others, to_best),
        against_base=_compare_all(found, base[0] if base else None),
    )


def _scores_of(row: TrialRow, folder: Path) -> RowScores | None:
    """Return the scores if they match the value in the study: the folder may have another study's files."""
    found = read_scores(folder / "trials" / str(row.number)) if row.perplexity is not None else None
    if found is None or row.perplexity is None or found[1] != row.best_rung:
        return None
    is_same = math.isclose(found[0].perplexity, row.perplexity, rel_tol=SAME_VALUE)
    return found[0] if is_same else None


def _compare_all(found: Mapping[int, RowScores], reference: RowScores | None) -> dict[int, Comparison]:
    if reference is None:
        return {}
    pairs = {number: compare(scores, reference) for number, scores in found.items()}
    return {number: comparison for number, comparison in pairs.items() if comparison is not None}
