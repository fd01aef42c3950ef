"""Hub data sets from a hub that answers: ours, on 127.0.0.1, in place of the public one."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import Repository, name_of, running_hub

READ = """
import json, sys
from lora_search.errors import LoraSearchError
from lora_search.reading.load import load_rows
from lora_search.settings.schema import DataConfig
for text in sys.argv[1:]:
    options = json.loads(text)
    commits = options.pop("commits", None)
    try:
        loaded = load_rows(DataConfig(**options), commits=commits)
        print(json.dumps([len(loaded.rows), loaded.revisions]))
    except LoraSearchError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


def rows(num_rows: int) -> bytes:
    lines = [{"question": f"Question {i}?", "answer": f"Answer {i}."} for i in range(num_rows)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def environment(home: Path, endpoint: str) -> dict[str, str]:
    usual = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    caches = {"HF_HOME": str(home), "LORA_SEARCH_CACHE": str(home / "ours")}
    return {**usual, **caches, "HF_ENDPOINT": endpoint}


def read(home: Path, endpoint: str, *options: dict[str, object]) -> list[tuple[int, str | dict[str, str]]]:
    """Return for each data set the number of rows and the commits, or exit code and message."""
    told = subprocess.run(
        [sys.executable, "-c", READ, *map(json.dumps, options)],
        env=environment(home, endpoint), capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return [tuple(json.loads(line)) for line in told.stdout.splitlines()]


FIRST, SECOND = {"train.jsonl": rows(5), "test.jsonl": rows(2)}, {"train.jsonl": rows(7)}


@pytest.mark.slow
def test_a_hub_data_set_is_read_at_its_commit_and_what_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    repositories = {
        "org/faq": Repository([FIRST]),
        "org/gated": Repository(refusal=(403, "GatedRepo")),
        "org/login": Repository(refusal=(401, "GatedRepo")),
    }
    asked = [
        {"path": "org/faq"}, {"path": "org/faq", "revision": "v9"}, {"path": "org/none"},
        {"path": "org/gated"}, {"path": "org/login"},
    ]  # fmt: skip
    with running_hub(repositories) as endpoint:
        found, *refused = read(tmp_path, endpoint, *asked)

        repositories["org/faq"].commits.append(SECOND)
        commit = name_of(FIRST)
        moved = read(
            tmp_path, endpoint, {"path": "org/faq"}, {"path": "org/faq", "commits": {"org/faq": commit}}
        )
    away = read(tmp_path, endpoint, {"path": "org/faq", "commits": {"org/faq": commit}})

    assert found == (7, {"org/faq": name_of(FIRST)})
    assert moved == [(7, {"org/faq": name_of(SECOND)}), found]
    assert away == [found]  # from the cache
    assert [code for code, _ in refused] == [2] * 4
    no_revision, none, gated, login = (str(message) for _, message in refused)
    assert no_revision.startswith("data.revision: Revision 'v9' doesn't exist for dataset 'org/faq'")
    assert none.startswith("data.path: org/none is neither a file or folder here nor a readable hub data set")
    assert none.endswith("the hub has no such data.")
    assert "the hub data set org/gated is gated. Ask for access at " in gated
    assert "the hub data set org/login is gated. Ask for access at " in login


def sweep(home: Path, endpoint: str, *overrides: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lora_search.sweep", "-cn", "smoke", "data=jsonl", "data.path=org/faq",
         "data.max_length=128", "study.n_trials=1", f"study.storage=sqlite:///{home}/s.db",
         f"runs_dir={home}/runs", "engine.device=cpu", *overrides],
        env=environment(home, endpoint), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_study_stays_at_the_commit_that_it_was_started_with(tmp_path: Path) -> None:
    repositories = {"org/faq": Repository([{"train.jsonl": rows(60)}])}
    with running_hub(repositories) as endpoint:
        sweep(tmp_path, endpoint)
        repositories["org/faq"].commits.append({"train.jsonl": rows(80)})

        sweep(tmp_path, endpoint, "study.n_trials=2")

    commit = name_of(repositories["org/faq"].commits[0])
    with sqlite3.connect(tmp_path / "s.db") as database:
        assert database.execute("select count(*) from trials").fetchone() == (2,)
        stored = "".join(row[0] for row in database.execute("select value_json from study_user_attributes"))
    assert f'"content.commit of org/faq": "{commit}"' in stored
