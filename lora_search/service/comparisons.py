"""Significant differences between settings trained with several seeds: paired over rows and seeds.

Both trials of a pair see the same rows and, seed by seed, the same order of rows. The difference of their
mean NLL has two independent sources of error: which rows were drawn, and which seeds. Their variances add;
the degrees of freedom are those of Welch and Satterthwaite, and the level is shared between all rivals of
the leader (Bonferroni).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from lora_search.results.certainty import compare
from lora_search.results.confirmation import Duel
from lora_search.trial import RowScores

LEVEL = 0.05  # the chance to call any tied rival worse


def duels_of(leader: int, scores: Mapping[tuple[int, int], RowScores]) -> list[Duel]:
    """Return the leader against each other trial; ``scores`` are those of (trial, seed). Only seeds that both
    have count; a pair with fewer than two is left out."""
    others = sorted({trial for trial, _ in scores} - {leader})
    duels = [_duel(leader, other, scores, LEVEL / max(1, len(others))) for other in others]
    return [duel for duel in duels if duel is not None]


def _duel(leader: int, other: int, scores: Mapping[tuple[int, int], RowScores], level: float) -> Duel | None:
    seeds = sorted({s for t, s in scores if t == leader} & {s for t, s in scores if t == other})
    own, others = ([scores[trial, seed] for seed in seeds] for trial in (leader, other))
    if len(seeds) < 2:
        return None
    over_rows = compare(mean_scores(others), mean_scores(own))
    if over_rows is None:
        return None
    gaps_K = np.array([theirs.mean_nll - mine.mean_nll for mine, theirs in zip(own, others, strict=True)])
    seed_error = float(gaps_K.std(ddof=1)) / math.sqrt(len(seeds))
    return Duel(
        leader=leader,
        other=other,
        difference=over_rows.difference,
        row_error=over_rows.error,
        seed_error=seed_error,
        critical=critical_value(over_rows.error, over_rows.num_rows, seed_error, len(seeds), level),
        num_rows=over_rows.num_rows,
        num_seeds=len(seeds),
    )


def mean_scores(scores: Sequence[RowScores]) -> RowScores:
    """Return each row's NLL, averaged over seeds."""
    return RowScores(np.mean([one.nll_R for one in scores], axis=0), scores[0].tokens_R)


def critical_value(row_error: float, num_rows: int, seed_error: float, num_seeds: int, level: float) -> float:
    """Return how many standard errors a difference must have, two-sided."""
    variances = np.array([row_error**2, seed_error**2])
    freedom = np.array([num_rows - 1, num_seeds - 1])
    if not variances.sum() > 0:
        return float(stats.norm.ppf(1 - level / 2))
    effective = variances.sum() ** 2 / (variances**2 / freedom).sum()
    return float(stats.t.ppf(1 - level / 2, effective))
