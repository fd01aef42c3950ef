"""The note on a study, as optuna-dashboard gives it to the browser."""

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import optuna_dashboard
import pytest
from optuna_dashboard import get_note, save_note

from lora_search.database.storage import quieten_optuna
from lora_search.output.dashboard_note import write_note, write_result
from lora_search.settings.composition import compose
from lora_search.settings.space import parse_space
from lora_search.study.about import attributes_of, describe
from tests.rows import ATTRIBUTES, ROWS


class SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture
def note() -> Iterator[str]:
    """What the dashboard's own API says of a new study."""
    study = optuna.create_study(study_name="smoke")
    config = compose("smoke", [])
    write_note(study, config, parse_space(config), "python -m lora_search.sweep -cn smoke", 322.1)
    app = optuna_dashboard.wsgi(study._storage)
    with make_server("127.0.0.1", 0, app, handler_class=SilentHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/api/studies/0") as answer:
            yield json.load(answer)["note"]["body"]
        server.shutdown()
        thread.join()


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
        write_result(study, ROWS, ATTRIBUTES, tmp_path)

    note = get_note(study)
    assert note.startswith("# Ours\n\nAsk Kim.\n")
    assert note.count("## Result") == 1
    assert "Best so far: trial **5**, perplexity **8.500** (-40.1 %)." in note
    assert f"report: `{tmp_path}/report.html`" in note


def test_each_of_the_best_trials_says_how_it_ended(study: optuna.Study, tmp_path: Path) -> None:
    write_result(study, ROWS, ATTRIBUTES, tmp_path)

    attrs = study._storage.get_study_system_attrs(study._study_id)
    notes = {n: attrs.get(f"dashboard:{study.trials[n]._trial_id}:note_str:0", "") for n in range(len(ROWS))}
    assert notes[5] == "**best**, perplexity 8.500 (-40.1 %)"
    assert notes[7].endswith("rung 3: not among the best 7 of 9")


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
