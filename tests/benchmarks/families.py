"""Recorded validation curves in families: one data set, number of rows and of epochs each.

Diverged trials are cut where how far they went tells nothing more.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CURVES = Path(__file__).with_name("curves.json")  # from `record`
RANKS, BATCHES = (8, 16, 32), (2, 4, 8)
# NLL of a diverged trial: how far it went tells nothing. About half a nat above the bare base's.
WORST, WORSE_BASES = 4.0, {"faq1": 4.8, "faq3": 4.8}
BARE = ("faq1", "faq3", "docs6")  # first rung after 8 rows: batch 8 measures the bare base, by warm-up


@dataclass(frozen=True)
class Family:
    """Recorded curves of one data set: settings, and log NLL at every rung."""

    name: str
    rates: tuple[float, float]  # learning rates that were recorded
    params: tuple[Mapping[str, float], ...]
    curves_NK: np.ndarray

    def untrained_rung(self, params: Mapping[str, float]) -> int:
        """Return the last rung at which a trial's learning rate was still 0; 0 if there is none."""
        return int(self.name in BARE and params["train.batch_size"] == 8)

    @property
    def num_rungs(self) -> int:
        return int(self.curves_NK.shape[1])


def families(*names: str) -> list[Family]:
    """Return what is recorded: all, or the families of these names."""
    recorded = json.loads(CURVES.read_text())
    return [family_of(name, recorded[name]["trials"]) for name in names or recorded]


def family_of(name: str, trials: Sequence[Mapping[str, Any]]) -> Family:
    """Return recorded curves as a family; a diverged one stays where it was worst."""
    num_rungs, worst = max(len(trial["losses"]) for trial in trials), WORSE_BASES.get(name, WORST)
    losses = [[*t["losses"], *[worst] * (num_rungs - len(t["losses"]))] for t in trials]
    rates = (5e-5, 5e-3 if name == "faq" else 2e-2)
    return Family(name, rates, tuple(t["params"] for t in trials), np.log(np.minimum(losses, worst)))
