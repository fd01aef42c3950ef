"""The note on a study, as optuna-dashboard gives it to the browser."""

import json
import threading
import urllib.request
from collections.abc import Iterator
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import optuna_dashboard
import pytest

from lora_search.output.dashboard_note import write_note
from lora_search.settings.composition import compose
from lora_search.settings.space import parse_space


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
