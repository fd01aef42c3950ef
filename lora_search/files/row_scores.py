"""How an adapter predicts each row of a split: a small numpy file. No torch; reading one executes nothing."""

import io
import zipfile
from pathlib import Path

import numpy as np

from lora_search.files.atomic import write_file
from lora_search.trial import RowScores

VALIDATION = "validation_rows.npz"  # in a trial's folder, of its best rung
TEST = "test_rows.npz"  # the same of the test split
BASE = "base_rows.npz"  # in the study's folder, of the bare base


def write_scores(folder: Path, scores: RowScores, rung: int, name: str = VALIDATION) -> None:
    """Put the scores of a rung into the folder, in the place of older ones. Raises WriteError."""
    content = io.BytesIO()
    np.savez_compressed(content, nll=scores.nll_R, tokens=scores.tokens_R, rung=np.int64(rung))
    write_file(folder / name, content.getvalue())


def read_scores(folder: Path, name: str = VALIDATION) -> tuple[RowScores, int] | None:
    """Return the scores and their rung; None if there is no such file or it cannot be read."""
    try:
        with np.load(folder / name, allow_pickle=False) as found:
            return RowScores(found["nll"], found["tokens"]), int(found["rung"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
