"""A study with its winner at an edge goes on with more choices: real files, the dashboard's own answers."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from optuna_dashboard import wsgi

from lora_search.errors import FingerprintError
from lora_search.results.ranking import best_of
from lora_search.settings.range_ends import edge_notes
from lora_search.settings.schema import SamplerConfig
from lora_search.study.study import SweepStudy
from lora_search.study.widening import take_changes
from tests.study.test_study import make_config, open_study, simulate

LR = {"lr": "tag(log, interval(1e-5, 1e-2))"}
NARROW = {"lora": {"r": "choice(8, 16)", "target_modules": "choice([q_proj], all-linear)"}, "optim": LR}
WIDE = {
    "lora": {"r": "choice(4, 8, 16, 32)", "target_modules": "choice(all-linear, [q_proj], [v_proj])"},
    "optim": LR,
}


def searched(tmp_path: Path, sampler: str = "random", n_trials: int = 8) -> SweepStudy:
    config = make_config(tmp_path, n_trials=n_trials, space=NARROW, sampler=SamplerConfig(name=sampler))
    study = open_study(config, tmp_path)
    simulate(study)
    return study


def drawn(study: SweepStudy) -> list[dict[str, object]]:
    return [row.params for row in study.rows()]


def asked_of_the_dashboard(study: SweepStudy) -> list[dict[str, str]]:
    """Return the parameters of every trial as the dashboard shows them."""
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": f"/api/studies/{study.table.study_id}", "QUERY_STRING": "",
        "SERVER_NAME": "x", "SERVER_PORT": "80", "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
    }  # fmt: skip
    answer = b"".join(wsgi(study.storage)(environ, lambda *_: None))
    return [
        {param["name"]: param["param_external_value"] for param in trial["params"]}
        for trial in json.loads(answer)["trials"]
    ]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "cmaes", "qmc"])
def test_a_study_with_finished_trials_gets_more_choices_and_goes_on(tmp_path: Path, sampler: str) -> None:
    first = searched(tmp_path, sampler)
    before = drawn(first)

    config = make_config(tmp_path, n_trials=24, space=WIDE, sampler=SamplerConfig(name=sampler))
    study = open_study(config, tmp_path)
    simulate(study)

    assert drawn(study)[:8] == before
    assert study.changes[0] == "space.lora.r: choice of 8, 16 -> choice of 4, 8, 16, 32"
    assert study.summary().finished == 24
    assert {params["lora.r"] for params in drawn(study)[8:]} > {4, 32}


def test_the_dashboard_shows_what_each_trial_chose_before_and_after(tmp_path: Path) -> None:
    first = searched(tmp_path)
    before = asked_of_the_dashboard(first)
    study = open_study(replace(first.config, space=WIDE), tmp_path)

    shown = asked_of_the_dashboard(study)

    assert shown == before
    assert [one["lora.r"] for one in shown] == [str(params["lora.r"]) for params in drawn(study)]


@pytest.mark.parametrize("rank", ["choice(4, 8)", "choice(16, 32)", "interval(8, 16)"])
def test_a_choice_may_not_go_and_nothing_is_written_then(tmp_path: Path, rank: str) -> None:
    first = searched(tmp_path)
    before = drawn(first)

    with pytest.raises(FingerprintError, match="space.lora.r: choice of 8, 16 -> "):
        open_study(
            replace(first.config, space={"lora": {**NARROW["lora"], "r": rank}, "optim": LR}), tmp_path
        )

    assert drawn(open_study(first.config, tmp_path)) == before


def test_choices_are_not_added_while_a_trial_runs(tmp_path: Path) -> None:
    config = make_config(tmp_path, n_trials=8, space=NARROW)
    study = open_study(config, tmp_path)
    study.claim(1)

    with pytest.raises(FingerprintError, match="space.lora.r, .*no trial runs, and trial 0 does. Stop the"):
        open_study(replace(config, space=WIDE), tmp_path)

    begun = drawn(study)
    study.hand_back("interrupted")
    study = open_study(replace(config, space=WIDE), tmp_path)
    simulate(study)
    assert (study.summary().finished, drawn(study)[:1]) == (8, begun)


def test_of_two_starts_with_more_choices_the_second_goes_on_though_the_first_trains(tmp_path: Path) -> None:
    first = searched(tmp_path)
    config = replace(first.config, space=WIDE, study=replace(first.config.study, n_trials=12))
    seen = first.identity  # as the second start has read it before the first one wrote
    early = open_study(config, tmp_path)
    early.claim(1)
    wanted = early.study.user_attrs["fingerprint"]

    take_changes(config.study, first.study, first.table, seen, wanted)

    assert first.study.user_attrs["fingerprint"] == wanted


def test_a_best_value_outside_the_first_range_is_found_by_the_overrides_of_the_report(tmp_path: Path) -> None:
    """The simulated perplexity is lowest at a learning rate of 1e-3, ten times the end of the range."""
    text, found = "tag(log, interval(1e-5, 1e-4))", list[float]()
    for n_trials in (10, 20, 30, 40):
        config = make_config(tmp_path, n_trials=n_trials, space={"optim": {"lr": text}})
        study = open_study(config, tmp_path)
        simulate(study)
        best = best_of(study.rows())
        assert best is not None
        found.append(float(str(best.params["optim.lr"])))
        notes = edge_notes(config, study.space, best.params)
        if not notes:
            break
        text = notes[0][1].removeprefix("'space.optim.lr=").removesuffix("'")

    assert found[0] < 1e-4
    assert 3e-4 < found[-1] < 3e-3
    assert notes == []


def test_a_worker_that_knows_only_the_old_choices_ends_with_a_word(tmp_path: Path) -> None:
    old = searched(tmp_path, n_trials=4)
    old.config.study.n_trials = 12  # it waited for trials of others, say
    config = make_config(tmp_path, n_trials=12, space=WIDE, sampler=SamplerConfig(name="random"))
    new = open_study(config, tmp_path)

    assert old.claim(1) == []
    assert old.claim(1) == []
    assert old.draws.outdated.startswith("space.lora.r, space.lora.target_modules: another start has added ")
    assert (old.is_finished, old.num_running_elsewhere()) == (False, 0)
    assert "exhausted" not in new.study.user_attrs
    simulate(new)
    assert new.summary().finished == 12
