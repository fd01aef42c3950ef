"""The note that optuna-dashboard shows for a study: the meaning of the figures and the next steps."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import BaseStorage
from optuna_dashboard import get_note, save_note

from lora_search.database.storage import explained_errors, open_storage
from lora_search.errors import LoraSearchError
from lora_search.results.certainty import certainty_of
from lora_search.results.findings import how_sure
from lora_search.results.formatting import show_change, show_perplexity
from lora_search.results.ranking import base_of, best_of, is_final, ranked
from lora_search.results.verdict import state_of
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.settings.space import Space
from lora_search.trial import TrialRow

logger = logging.getLogger(__name__)

NOTE = """\
# {name}

Lower is better: validation perplexity of **{base}** without an adapter is **{perplexity}**.

- A step is a *rung*: step k is k/{evals_per_epoch} epochs of training examples seen, at every batch size.
- A trial's value is its lowest validation perplexity. `reason` says why one was pruned, stopped or failed.
- Stopping the sweep loses nothing: the same command continues it. A higher `study.n_trials` adds trials.

Searched:

{searched}

```sh
{command}
```
"""

RESULT = "\n## Result\n"  # what follows is the sweep's; what stands before it, people may change
MOST_TRIALS = 20  # of the best, with a note: each is written into the study


def write_note(
    study: optuna.Study, config: SweepConfig, space: Space, command: str, base_perplexity: float
) -> None:
    """Write the study's note. It replaces any note of the user: use it only for a new study."""
    searched = "\n".join(f"- `{key}`: {text}" for key, text in space.expressions.items())
    save_note(
        study,
        NOTE.format(
            name=config.study.name,
            base=config.model.path,
            perplexity=show_perplexity(base_perplexity),
            evals_per_epoch=config.train.evals_per_epoch,
            searched=searched or "- nothing",
            command=command,
        ),
    )


def note_result(
    config: StudyConfig, rows: Sequence[TrialRow], attributes: Mapping[str, str], folder: Path
) -> None:
    """Write the result into the study's notes. A database that is gone by now is told of, and no error."""
    try:
        with explained_errors(config):
            study = optuna.load_study(study_name=config.name, storage=open_storage(config))
            write_result(study, rows, attributes, folder)
    except LoraSearchError as error:
        logger.warning("the dashboard's note lacks the result: %s", error)


def write_result(
    study: optuna.Study, rows: Sequence[TrialRow], attributes: Mapping[str, str], folder: Path
) -> None:
    """Add the result to the study's note, in the place of an older one, and say in a note on each of the best
    trials how it ended."""
    best, base, certainty = best_of(rows), base_of(attributes), certainty_of(rows, folder)
    if best is None:
        return
    so_far = "" if is_final(rows, attributes) else " so far"
    change = show_change(base, best.perplexity)
    value = show_perplexity(best.perplexity)
    headline = f"Best{so_far}: trial **{best.number}**, perplexity **{value}** ({change})."
    sure = "\n".join(f"- {sentence}" for sentence in how_sure(rows, attributes, certainty, best))
    links = f"- report: `{folder / 'report.html'}`\n- best adapter: `{folder / 'best' / 'adapter'}`"
    before = get_note(study).partition(RESULT)[0].rstrip()
    save_note(study, f"{before}\n{RESULT}\n{headline}\n\n{sure}\n{links}\n")
    ids = {trial.number: trial._trial_id for trial in study.get_trials(deepcopy=False)}
    for row in ranked(rows)[:MOST_TRIALS]:
        state = "best" if row is best else state_of(row, certainty)
        text = (
            f"**{state}**, perplexity {show_perplexity(row.perplexity)} ({show_change(base, row.perplexity)})"
        )
        trial = NotedTrial(study, study._storage, ids[row.number])
        if text not in get_note(trial):
            save_note(trial, f"{text}\n\n{row.reason}".rstrip())


@dataclass(frozen=True)
class NotedTrial:
    """A finished trial as save_note needs it. optuna.Trial would ask the sampler."""

    study: optuna.Study
    storage: BaseStorage
    _trial_id: int
