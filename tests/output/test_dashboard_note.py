"""The note on a study, as optuna-dashboard gives it to the browser."""

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server
from xml.etree import ElementTree

import optuna
import optuna_dashboard
import pytest
from optuna.artifacts import FileSystemArtifactStore
from optuna_dashboard import get_note, save_note

from lora_search.database.storage import quieten_optuna
from lora_search.output.dashboard_note import attach_files, remove_files, write_note, write_plot, write_result
from lora_search.results.record import StudyRecord
from lora_search.settings.composition import compose
from lora_search.settings.space import parse_space
from lora_search.study.provenance import attributes_of, describe
from tests.rows import ATTRIBUTES, BASE_PERPLEXITY, ROWS
from tests.study.test_study import make_config, open_study, simulate


@contextmanager
def served(study: optuna.Study, files: Path | None = None) -> Iterator[str]:
    """Yield the address of the dashboard's own program, in this process."""
    store = FileSystemArtifactStore(files) if files else None
    app = optuna_dashboard.wsgi(study._storage, artifact_store=store)
    with make_server("127.0.0.1", 0, app, handler_class=SilentHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetched(address: str) -> bytes:
    with urllib.request.urlopen(address) as answer:
        return bytes(answer.read())


class SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture
def note() -> Iterator[str]:
    """What the dashboard's own API says of a new study."""
    study = optuna.create_study(study_name="smoke")
    config = compose("smoke", [])
    write_note(study, config, parse_space(config), "python -m lora_search.sweep -cn smoke", 322.1)
    with served(study) as address:
        yield json.loads(fetched(f"{address}/api/studies/0"))["note"]["body"]


def test_the_dashboard_says_what_the_figures_mean_and_how_to_go_on(note: str) -> None:
    assert note.startswith("# smoke\n")
    assert "validation perplexity of **tiny-llama** without an adapter is **322.1**" in note
    assert "step k is k/4 epochs" in note
    assert "- `lora.r`: choice(8, 16, 32)" in note
    assert "python -m lora_search.sweep -cn smoke" in note


@pytest.fixture
def study() -> optuna.Study:
    """A study in memory with as many trials as ROWS."""
    quieten_optuna()
    study = optuna.create_study(study_name="faq")
    study.add_trials([optuna.trial.create_trial(value=1.0) for _ in ROWS])
    return study


def test_the_result_takes_the_place_of_an_older_one_and_leaves_what_people_wrote(
    study: optuna.Study, tmp_path: Path
) -> None:
    save_note(study, "# Ours\n\nAsk Kim.")

    for _ in range(2):
        write_result(study, StudyRecord(ROWS, ATTRIBUTES, tmp_path))

    note = get_note(study)
    assert note.startswith("# Ours\n\nAsk Kim.\n")
    assert note.count("## Result") == 1
    assert "Best so far: trial **5**, perplexity **8.500** (-40.1 %)." in note
    assert f"report: `{tmp_path}/report.html`" in note


def test_each_of_the_best_trials_says_how_it_ended(study: optuna.Study, tmp_path: Path) -> None:
    write_result(study, StudyRecord(ROWS, ATTRIBUTES, tmp_path))

    attrs = study._storage.get_study_system_attrs(study._study_id)
    notes = {n: attrs.get(f"dashboard:{study.trials[n]._trial_id}:note_str:0", "") for n in range(len(ROWS))}
    assert notes[5] == "**best**, perplexity 8.500 (-40.1 %)"
    assert notes[7].endswith("rung 3: not among the best 7 of 9")


def test_the_plot_has_the_base_as_a_reference_and_every_number_of_the_study(study: optuna.Study) -> None:
    for _ in range(2):
        write_plot(study, StudyRecord(ROWS, ATTRIBUTES, Path("faq")))

    with served(study) as address:
        plots = json.loads(fetched(f"{address}/api/studies/0"))["plotly_graph_objects"]
    (figure,) = [json.loads(plot["graph_object"]) for plot in plots]
    lines = {line["name"]: line for line in figure["data"]}
    assert lines["base model"]["y"] == [BASE_PERPLEXITY, BASE_PERPLEXITY]
    assert lines["base model"]["x"] == [0, 12]
    best = lines["trial 5, best (complete)"]
    assert best["x"] == [0, *ROWS[5].perplexities]
    assert best["y"] == [BASE_PERPLEXITY, *ROWS[5].perplexities.values()]
    assert len(lines) == 1 + sum(bool(row.perplexities) for row in ROWS)


def test_curves_adapter_and_report_are_the_study_s_files(study: optuna.Study, tmp_path: Path) -> None:
    folder = tmp_path / "runs/faq"
    (folder / "best/adapter").mkdir(parents=True)
    (folder / "best/adapter/adapter_model.safetensors").write_bytes(b"older")
    (folder / "report.html").write_text("<h1>faq</h1>")

    attach_files(study, StudyRecord(ROWS, ATTRIBUTES, folder))
    (folder / "best/adapter/adapter_model.safetensors").write_bytes(b"weights")
    attach_files(study, StudyRecord(ROWS, ATTRIBUTES, folder))

    with served(study, tmp_path / "runs/.dashboard") as address:
        found = json.loads(fetched(f"{address}/api/studies/0"))["artifacts"]
        files = {one["filename"]: fetched(f"{address}/artifacts/0/{one['artifact_id']}") for one in found}
    assert sorted(files) == ["adapter_model.safetensors", "learning_curves.csv", "report.html"]
    assert files["adapter_model.safetensors"] == b"weights"
    assert files["report.html"] == b"<h1>faq</h1>"
    curves = files["learning_curves.csv"].decode().splitlines()
    assert f"5,12,{ROWS[5].perplexities[12]}" in curves
    assert len(curves) == 1 + sum(len(row.perplexities) for row in ROWS)

    remove_files(tmp_path / "runs", "faq")  # the trials' curves too
    assert not (tmp_path / "runs/.dashboard").exists()


def test_each_of_the_best_trials_has_its_curve_as_a_picture(study: optuna.Study, tmp_path: Path) -> None:
    for _ in range(2):
        attach_files(study, StudyRecord(ROWS, ATTRIBUTES, tmp_path / "runs/faq"))

    with served(study, tmp_path / "runs/.dashboard") as address:
        found = json.loads(fetched(f"{address}/api/studies/0"))
        shown = {trial["number"]: trial["artifacts"] for trial in found["trials"]}
        (of_third,) = shown[3]
        drawn = ElementTree.fromstring(
            fetched(f"{address}/artifacts/0/{study.trials[3]._trial_id}/{of_third['artifact_id']}")
        )
    assert (of_third["filename"], of_third["mimetype"]) == ("learning_curve.svg", "image/svg+xml")
    titles = [title.text or "" for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert [title.split(":")[0] for title in titles] == ["trial 3, complete", "trial 5, complete"]
    assert sum(map(len, shown.values())) == sum(bool(row.perplexities) for row in ROWS)


def test_a_trial_shows_nothing_that_its_page_cannot_wrap(tmp_path: Path) -> None:
    """The page shows an attribute as JSON without spaces; one of 150 letters made it 1,459 pixels wide."""
    held = open_study(make_config(tmp_path, n_trials=12), tmp_path)
    simulate(held)

    shown = [value for trial in held.study.get_trials() for value in trial.user_attrs.values()]
    words = [word for value in shown for word in json.dumps(value, separators=(",", ":")).split()]
    assert len(shown) >= 12
    assert max(map(len, words)) < 60


def test_a_study_shows_a_dozen_attributes_and_knows_them_all(study: optuna.Study) -> None:
    known = {f"setting/{number}": "1" for number in range(90)} | {"command": "make", "data.train": "402"}

    describe(study, known)
    describe(study, {"setting/1": "2"})

    assert study.user_attrs == {"command": "make", "data.train": "402"}
    assert attributes_of(study) == known | {"setting/1": "2"}


def test_an_older_study_with_all_of_it_in_sight_is_read_the_same() -> None:
    quieten_optuna()
    older = optuna.create_study()
    older.set_user_attr("setting/sweep.seed", "1")

    describe(older, {"setting/sweep.seed": "2"})

    assert attributes_of(older) == {"setting/sweep.seed": "2"}
