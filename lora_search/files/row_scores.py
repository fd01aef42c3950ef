"""Scores of an adapter on each row of a split, in a small numpy file. No torch; reading runs no code."""

import io
import zipfile
from pathlib import Path

import numpy as np

from lora_search.files.atomic import write_file
from lora_search.trial import RowScores

VALIDATION = "validation_rows.npz"  # in a trial's folder: its best rung
TEST = "test_rows.npz"  # the same on the test split
BASE = "base_rows.npz"  # in the study's folder: the bare base


def write_scores(folder: Path, scores: RowScores, rung: int, name: str = VALIDATION) -> None:
    """Write the scores of a rung to the folder, replacing older ones. Raises WriteError."""
    content = io.BytesIO()
    np.savez_compressed(content, nll=scores.nll_R, tokens=scores.tokens_R, rung=np.int64(rung))
    write_file(folder / name, content.getvalue())


def read_scores(folder: Path, name: str = VALIDATION) -> tuple[RowScores, int] | None:
    """Return the scores and their rung; None if the file is missing or unreadable."""
    try:
        with np.load(folder / name, allow_pickle=False) as found:
            return RowScores(found["nll"], found["tokens"]), int(found["rung"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
