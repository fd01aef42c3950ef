"""Files of trials that ran on other nodes come from artifacts.uri, for the conclusion of a sweep and for the
commands after it; the answer goes there. Whatever fails there is a line on the screen: the answer stays."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_search.errors import LoraSearchError, StudyError
from lora_search.files.artifacts import Artifacts, place_of
from lora_search.files.row_scores import BASE, VALIDATION, read_scores
from lora_search.output.terminal import Progress
from lora_search.results.ranking import best_of
from lora_search.results.record import StudyRecord
from lora_search.results.samples import FILE as SAMPLES
from lora_search.results.samples import read_samples
from lora_search.settings.schema import SweepConfig
from lora_search.settings.secrets import redact
from lora_search.study.folder import own_folder
from lora_search.trial import TrialRow

SHOWN = ("best", "report.html")  # of the study's folder
SHARED = ("tokenizer", BASE, SAMPLES)  # that other nodes need: of them, samples only a finished sweep has


@contextmanager
def shared_results(config: SweepConfig, record: StudyRecord, progress: Progress) -> Iterator[None]:
    """Bring what the conclusion inside needs; then copy what it has written to artifacts.uri."""
    artifacts = None
    with told(progress):
        artifacts = copies_of(config, record.attributes)
        bring_results(record.rows, record.folder, artifacts)
    yield
    if artifacts is not None:
        with told(progress):
            for name in SHOWN:
                artifacts.show(record.folder / name, name)


@contextmanager
def told(progress: Progress) -> Iterator[None]:
    """Show an error that ends what is inside, and go on."""
    try:
        yield
    except LoraSearchError as error:
        progress.event(str(error))


def copies_of(config: SweepConfig, attributes: Mapping[str, str]) -> Artifacts | None:
    """Return the study's files at artifacts.uri; None without it. Raises ConfigError."""
    if config.artifacts.uri is None:
        return None
    return Artifacts(config.artifacts.uri, place_of(config.study.name, attributes.get("study_id")))


def share(folder: Path, artifacts: Artifacts | None) -> None:
    """Copy what is of no single trial and a command elsewhere needs. Raises ArtifactError."""
    for name in SHARED:
        if artifacts is not None and (folder / name).exists():
            artifacts.share(name, folder)


def bring_shared(best: TrialRow, folder: Path, artifacts: Artifacts) -> None:
    """Bring what `share` copied, where the folder lacks it. Raises ArtifactError."""
    here = {name: (folder / name).exists() for name in SHARED}
    here[SAMPLES] = bool(read_samples(folder, best))
    artifacts.bring([name for name, is_here in here.items() if not is_here], folder)


def bring_results(
    rows: Sequence[TrialRow], folder: Path, artifacts: Artifacts | None, trials: Collection[int] | None = None
) -> None:
    """Bring the files of these trials (None: the best), how the other trials predict each row, and what
    `share` copied, where the folder lacks them. Raises ArtifactError."""
    best = best_of(rows)
    if artifacts is None or best is None:
        return
    bring_shared(best, folder, artifacts)
    wanted = lacking(rows, folder, [best.number] if trials is None else trials)
    artifacts.fetch_all(wanted, folder / "trials")


def lacking(rows: Sequence[TrialRow], folder: Path, trials: Collection[int]) -> dict[int, str]:
    """Return trial -> suffix of the files to fetch ("": all), of the trials whose row scores here are not of
    their best rung, as an adapter here is not either, and of those in ``trials`` without an adapter here."""
    found = {}
    for row in rows:
        place = folder / "trials" / str(row.number)
        scores, has_adapter = read_scores(place), (place / "adapter").is_dir()
        is_known = scores is not None and scores[1] == row.best_rung
        if row.perplexity is not None and not (is_known and (has_adapter or row.number not in trials)):
            found[row.number] = "" if has_adapter or row.number in trials else VALIDATION
    return found


def bring_files(
    config: SweepConfig, record: StudyRecord, progress: Progress, trials: Collection[int] = ()
) -> None:
    """For a command after the search: bring what this node lacks, with the adapters of ``trials``.

    Raises ConfigError if the folder is another study's.
    """
    rows, folder = record.rows, record.folder
    num_trials = len(lacking(rows, folder, trials))
    lacks_shared = not all((folder / name).exists() for name in SHARED if name != SAMPLES)  # it may have none
    if config.artifacts.uri is None or not (num_trials or lacks_shared):
        return
    own_folder(config.study, folder)
    progress.event(f"{redact(config.artifacts.uri)}: fetching what this machine lacks of {num_trials} trials")
    with told(progress):
        bring_results(rows, folder, copies_of(config, record.attributes), trials)


def adapter_here(folder: Path, number: int) -> Path:
    """Return the folder of a trial's adapter. Raises StudyError if it is on another machine only."""
    adapter = folder / "trials" / str(number) / "adapter"
    if not adapter.is_dir():
        raise StudyError(
            f"trial {number}: its adapter is not in {adapter}, nor at artifacts.uri. Copy the folder of the "
            "trial from the machine that trained it, or name another trial."
        )
    return adapter
