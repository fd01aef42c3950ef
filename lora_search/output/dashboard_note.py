"""What optuna-dashboard shows of a study: a note with the meaning of the figures and the result, a plot with
the base as a reference, learning curves, best adapter and report as files, and of each of the best trials
its curve.

The files are copies in runs/.dashboard: the dashboard serves one folder for all studies of a database.
"""

import io
import json
import logging
import mimetypes
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import optuna
from optuna.artifacts import ArtifactMeta, FileSystemArtifactStore
from optuna.artifacts._upload import ARTIFACTS_ATTR_PREFIX
from optuna_dashboard import get_note, save_note, save_plotly_graph_object

from lora_search.database.storage import explained_errors, open_storage
from lora_search.errors import LoraSearchError
from lora_search.files.atomic import explained_writing
from lora_search.output.terminal import DASHBOARD_FILES
from lora_search.page.charts import curve_file
from lora_search.results.findings import how_sure
from lora_search.results.formatting import show_change, show_perplexity
from lora_search.results.ranking import ranked
from lora_search.results.record import StudyRecord
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

RESULT = "\n## Result\n"  # the sweep writes what follows; people may change what comes before
MOST_TRIALS = 20  # of the best, with a note: each is written into the study
MOST_LETTERS = 90  # of a line in the note
MOST_CURVES = 40  # in the plot, which is kept in the study in pieces of 2 kB
MOST_BYTES = 256 * 2**20  # of a file that is copied for the dashboard; the note names the folder anyway
CURVES = "learning_curves.csv"
FILES = (CURVES, "best/adapter/adapter_model.safetensors", "report.html")
TRIAL_CURVE = "learning_curve.svg"
OF_TRIAL = "dashboard:artifacts:{}:"  # in the study: Optuna's own place refuses trials that have ended
BASE_NAME = "base model"


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
            command=folded(command),
        ),
    )


def folded(command: str) -> str:
    """Return a command over several lines: optuna-dashboard makes its page as wide as the longest."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        is_full = len(lines[-1]) + len(word) > MOST_LETTERS
        lines.append(word) if is_full else lines.append(f"{lines.pop()} {word}".strip())
    return " \\\n  ".join(line for line in lines if line)


def note_result(config: StudyConfig, record: StudyRecord) -> None:
    """Write result, plot and files for the dashboard. If the database is gone or the disk is full,
    that is reported and nothing is raised."""
    try:
        with explained_errors(config):
            study = optuna.load_study(study_name=config.name, storage=open_storage(config))
            write_result(study, record)
            write_plot(study, record)
            attach_files(study, record)
    except LoraSearchError as error:
        logger.warning("the dashboard lacks the result: %s", error)


def write_result(study: optuna.Study, record: StudyRecord) -> None:
    """Add the result to the study's note, in the place of an older one, and say in a note on each of the best
    trials how it ended."""
    best, base, folder = record.best, record.base, record.folder
    if best is None:
        return
    so_far = "" if record.is_final else " so far"
    change = show_change(base, best.perplexity)
    value = show_perplexity(best.perplexity)
    headline = f"Best{so_far}: trial **{best.number}**, perplexity **{value}** ({change})."
    sure = "\n".join(f"- {sentence}" for sentence in how_sure(record))
    links = f"- report: `{folder / 'report.html'}`\n- best adapter: `{folder / 'best' / 'adapter'}`"
    before = get_note(study).partition(RESULT)[0].rstrip()
    save_note(study, f"{before}\n{RESULT}\n{headline}\n\n{sure}\n{links}\n")
    ids = trial_ids(study)
    for row in ranked(record.rows)[:MOST_TRIALS]:
        state = "best" if row is best else state_of(row, record.certainty)
        text = (
            f"**{state}**, perplexity {show_perplexity(row.perplexity)} ({show_change(base, row.perplexity)})"
        )
        # As save_note needs it: optuna.Trial would ask the sampler.
        trial = SimpleNamespace(study=study, storage=study._storage, _trial_id=ids[row.number])
        if text not in get_note(trial):
            save_note(trial, f"{text}\n\n{row.reason}".rstrip())


def trial_ids(study: optuna.Study) -> dict[int, int]:
    """Return the id in the database of every trial, by number."""
    return {trial.number: trial._trial_id for trial in study.get_trials(deepcopy=False)}


def write_plot(study: optuna.Study, record: StudyRecord) -> None:
    """Draw the curves of the best trials with the base as a dashed line, in place of an older plot."""
    base, shown = record.base, _measured(record)[:MOST_CURVES]
    lines: list[dict[str, object]] = [
        {
            "x": [0, *row.perplexities],
            "y": [base, *row.perplexities.values()],
            "name": f"trial {row.number}{', best' if row is record.best else ''} ({row.state.lower()})",
            "line": {"width": 4 if row is record.best else 1.5},
        }
        for row in shown[::-1]  # the best is drawn last, over the others
    ]
    longest = max((max(row.perplexities) for row in shown), default=1)
    reference = {"x": [0, longest], "y": [base, base], "name": BASE_NAME, "mode": "lines"}
    lines.append({**reference, "line": {"dash": "dash", "color": "gray"}})
    whose = f" of the best {len(shown)} trials" if len(record.rows) > len(shown) else ""
    axes = {
        "xaxis": {"title": {"text": "rung"}},
        "yaxis": {"title": {"text": "validation perplexity"}, "type": "log"},
    }
    picture = {"data": lines, "layout": {"title": {"text": f"Learning curves{whose}"}, **axes}}
    figure = SimpleNamespace(to_json=lambda: json.dumps(picture))  # without the plotly package
    save_plotly_graph_object(study, figure, graph_object_id="learning-curves")


def _measured(record: StudyRecord) -> list[TrialRow]:
    return [row for row in ranked(record.rows) if row.perplexities]


def artifact_folder(runs_dir: Path) -> Path:
    """Return the folder for `optuna-dashboard --artifact-dir`."""
    return runs_dir / DASHBOARD_FILES


def artifact_id(study_id: str, name: str) -> str:
    """Return the id of a study's file: a newer one takes the place of an older one."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"lora_search/{study_id}/{name}"))


def attach_files(study: optuna.Study, record: StudyRecord) -> None:
    """Copy learning curves, best adapter and report for the dashboard, and draw each of the best trials'
    curves. Raises WriteError."""
    place, study_id = (
        artifact_folder(record.folder.parent),
        record.attributes.get("study_id", study.study_name),
    )
    store, known = FileSystemArtifactStore(place), study._storage.get_study_system_attrs(study._study_id)

    def attach(prefix: str, name: str, file_id: str, content: BinaryIO) -> None:
        with content:
            store.write(file_id, content)
        of_file = mimetypes.guess_type(name)[0] or "application/octet-stream"
        value = json.dumps(asdict(ArtifactMeta(file_id, Path(name).name, of_file, None)))
        if known.get(prefix + file_id) != value:
            study._storage.set_study_system_attr(study._study_id, prefix + file_id, value)

    with explained_writing(place):
        place.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            curves = io.BytesIO(curves_as_csv(record.rows).encode())
            content = curves if name == CURVES else opened(record.folder / name)
            if content is not None:
                attach(ARTIFACTS_ATTR_PREFIX, name, artifact_id(study_id, name), content)
        ids = trial_ids(study)
        for row in _measured(record)[:MOST_TRIALS]:
            drawn = io.BytesIO(curve_file(row, record.best, record.base).encode())
            file_id = f"{artifact_id(study_id, TRIAL_CURVE)}-{row.number}"
            attach(OF_TRIAL.format(ids[row.number]), TRIAL_CURVE, file_id, drawn)


def opened(path: Path) -> io.BufferedReader | None:
    """Return the file, if it is there and not too large to be copied."""
    return path.open("rb") if path.is_file() and path.stat().st_size <= MOST_BYTES else None


def curves_as_csv(rows: Sequence[TrialRow]) -> str:
    """Return a line per trial and rung."""
    lines = [f"{row.number},{rung},{value}" for row in rows for rung, value in row.perplexities.items()]
    return "\n".join(["trial,rung,validation_perplexity", *lines]) + "\n"


def remove_files(runs_dir: Path, study_id: str) -> None:
    """Delete the study's files for the dashboard, and their folder where no other study has any."""
    place = artifact_folder(runs_dir)
    of_trials = place.glob(f"{artifact_id(study_id, TRIAL_CURVE)}-*")
    for path in (*(place / artifact_id(study_id, name) for name in FILES), *of_trials):
        path.unlink(missing_ok=True)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()
