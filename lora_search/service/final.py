"""Trains a trial's settings once more, on the rows by which trials are scored as well: for use, not scores.

The schedule is the trial's over the longer data; training ends at the rung that was its best, and that rung's
adapter is kept. After a kill, a second start continues from the last rung. Imports torch.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_search.data.rows import Splits
from lora_search.data.serving import write_serving
from lora_search.data.store import JoinedRows
from lora_search.engine.build import Room
from lora_search.engine.digest import content_before_loading
from lora_search.errors import StudyError
from lora_search.files.lock import alone
from lora_search.output.terminal import Progress
from lora_search.prepare import open_engine
from lora_search.service.reopen import identity_of, read_again
from lora_search.settings.overlay import trial_seed
from lora_search.settings.schema import SweepConfig
from lora_search.training import train_all
from lora_search.trial import Measurement, TrialRow, TrialRun, TrialSettings, draw_seed

FOLDER = "final"  # in the study's, while it is trained


@dataclass(frozen=True)
class Trained:
    """A finished run: where its adapter is, on how many rows it was trained, what it measures on the old
    validation rows, which it has seen."""

    seed: int
    adapter: Path
    num_rows: int
    perplexity: float


def train_final(
    config: SweepConfig, row: TrialRow, settings: TrialSettings, folder: Path, names: Sequence[str],
    seeds: int, progress: Progress,
) -> list[Trained]:  # fmt: skip
    """Train the settings with so many seeds, packed, up to the trial's best rung. Raises StudyError where one
    fails or diverges, or another process does the same."""
    place = folder.resolve() / FOLDER
    with alone(place, "final"):
        inputs = read_again(config)
        splits = with_more(inputs.splits, names)
        progress.event(f"{len(splits.train)} rows to train on instead of {len(inputs.splits.train)}")
        wider = content_before_loading(config, inputs.source, inputs.model, inputs.tokenizer, splits)
        slots = config.engine.slots
        sized = replace(config.engine, slots=min(slots, seeds) if isinstance(slots, int) else slots)
        room, more = Room.of([settings] * seeds), replace(inputs, splits=splits, content=wider)
        engine, _ = open_engine(replace(config, engine=sized), room, more)
        if not (folder / "tokenizer").is_dir():  # a machine that never searched
            generation = engine.model.language_model.generation_config.to_diff_dict()
            write_serving(folder / "tokenizer", inputs.tokenizer, config.template, generation)
        trained = place / "-".join(["trial", str(row.number), *names])
        runs = runs_for(config, row, settings, trained, identity_of(config).id or "", seeds)
        ends = {m.trial_number: m for m in follow(runs, train_all(engine, runs), progress)}
    return [
        Trained(number + 1, Path(run.folder) / "adapter", len(splits.train), ends[number].perplexity)
        for number, run in enumerate(runs)
    ]


def with_more(splits: Splits, names: Sequence[str]) -> Splits:
    """Return splits whose training rows are those of all these; the validation rows stay, as measured."""
    parts = [getattr(splits, name) for name in names]
    return replace(splits, train=JoinedRows(parts))


def runs_for(
    config: SweepConfig, row: TrialRow, settings: TrialSettings, place: Path, study_id: str, seeds: int
) -> list[TrialRun]:
    """Return a run per seed; the first has the trial's own."""
    own = trial_seed(config, row.params, row.number)
    return [
        TrialRun(
            number=number,
            seed=draw_seed(own, number) if number else own,
            order_seed=draw_seed(config.seed, number) if number else None,
            last_rung=row.best_rung,
            settings=settings,
            folder=str(place / f"seed-{number + 1}"),
            study_id=study_id,
        )
        for number in range(seeds)
    ]


def follow(
    runs: Sequence[TrialRun], measured: Iterable[Measurement], progress: Progress
) -> list[Measurement]:
    """Return the last measurement of each run. Raises StudyError for one that came to no good end."""
    ends = []
    for m in measured:
        rungs = runs[m.trial_number].last_rung
        progress.event(f"seed {m.trial_number + 1}: rung {m.rung} of {rungs}")
        if m.ended in ("failed", "diverged"):
            raise StudyError(f"final: seed {m.trial_number + 1} {m.ended}: {m.detail}. Nothing is exported.")
        ends += [m] if m.ended else []
    return ends


def forget(trained: Trained) -> None:
    """Remove the folder that it was trained in, once it is exported."""
    shutil.rmtree(trained.adapter.parent, ignore_errors=True)
