"""A study in a real PostgreSQL, at small size; the storms with many workers are in tests/worker."""

from pathlib import Path

from tests.processes import postgres_server
from tests.study.test_study import make_config, open_study, simulate, states


def test_a_study_in_postgresql_comes_to_its_total_and_the_next_start_finds_it_done(tmp_path: Path) -> None:
    with postgres_server(tmp_path / "pg") as url:
        config = make_config(tmp_path, storage=url, n_trials=5)
        study = open_study(config, tmp_path)
        simulate(study, slots=2)

        again = open_study(config, tmp_path)

        assert again.is_finished
        assert again.claim(1) == []
        assert sum(states(again).values()) == again.summary().finished == 5
        for opened in (study, again):
            opened.storage.engine.dispose()
