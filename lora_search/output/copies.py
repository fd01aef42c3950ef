"""The conclusion of a sweep whose trials ran on several nodes: files on other disks come from
artifacts.uri, and the answer goes there. Whatever fails there is a line on the screen: the answer stays."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_search.errors import LoraSearchError
from lora_search.files.artifacts import Artifacts, place_of
from lora_search.files.row_scores import VALIDATION
from lora_search.output.terminal import Progress
from lora_search.results.ranking import best_of
from lora_search.settings.schema import SweepConfig
from lora_search.trial import TrialRow

SHOWN = ("best", "report.html")  # of the study's folder


@contextmanager
def shared_results(
    config: SweepConfig,
    attributes: Mapping[str, str],
    rows: Sequence[TrialRow],
    folder: Path,
    progress: Progress,
) -> Iterator[None]:
    """Bring what the conclusion inside needs; then copy what it has written to artifacts.uri."""
    if config.artifacts.uri is None:
        yield
        return
    artifacts = None
    try:
        place = place_of(config.study.name, attributes.get("study_id"))
        artifacts = Artifacts(config.artifacts.uri, place)
        bring_results(rows, folder, artifacts)
    except LoraSearchError as error:
        progress.event(str(error))
    yield
    if artifacts is None:
        return
    try:
        for name in SHOWN:
            artifacts.publish(folder / name, name)
    except LoraSearchError as error:
        progress.event(str(error))


def bring_results(rows: Sequence[TrialRow], folder: Path, artifacts: Artifacts | None) -> None:
    """Bring the best trial's files, and how the other trials predict each row. Raises ArtifactError."""
    best = best_of(rows)
    if artifacts is None or best is None:
        return
    artifacts.fetch(best.number, folder / "trials" / str(best.number))
    for row in rows:
        if row.perplexity is not None and row.number != best.number:
            artifacts.fetch(row.number, folder / "trials" / str(row.number), suffix=VALIDATION)
