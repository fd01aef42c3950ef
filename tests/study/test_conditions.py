"""A study whose trials have different keys: draws, resumes, more choices, the dashboard's own answers."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from lora_search.errors import FingerprintError
from lora_search.page.diagrams import ABSENT, parallel
from lora_search.results.importance import importances
from lora_search.search.trials import params_of
from lora_search.settings.schema import PrunerConfig, SamplerConfig, SweepConfig
from lora_search.study.study import SweepStudy
from tests.study.test_study import make_config, open_study, simulate
from tests.study.test_widening import asked_of_the_dashboard, drawn

LR = (
    "when(lora.target_modules, [q_proj], tag(log, interval({}, 1e-2)), "
    "all-linear, tag(log, interval(1e-5, 1e-3)){})"
)
SPACE = {
    "lora": {"target_modules": "choice([q_proj], all-linear)"},
    "optim": {
        "lr": LR.format("1e-3", ""),
        "schedule": "choice(cosine, wsd)",
        "decay_ratio": "when(optim.schedule, wsd, choice(0.1, 0.3, 0.5))",
    },
}
WIDER = {
    "lora": {"target_modules": "choice([q_proj], all-linear, [v_proj])"},
    "optim": {
        "lr": LR.format("1e-4", ", [v_proj], tag(log, interval(5e-3, 6e-3))"),
        "schedule": "choice(cosine, wsd)",
        "decay_ratio": "when(optim.schedule, wsd, choice(0.1, 0.3, 0.5, 0.7))",
    },
}


def config_of(tmp_path: Path, sampler: str = "tpe", n_trials: int = 24) -> SweepConfig:
    pruner = PrunerConfig(name="none")
    return make_config(
        tmp_path, n_trials=n_trials, space=SPACE, sampler=SamplerConfig(name=sampler), pruner=pruner
    )


def searched(tmp_path: Path, sampler: str = "tpe", n_trials: int = 24) -> SweepStudy:
    study = open_study(config_of(tmp_path, sampler, n_trials), tmp_path)
    simulate(study)
    return study


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_every_trial_has_the_keys_and_ranges_of_its_choices(tmp_path: Path, sampler: str) -> None:
    study = searched(tmp_path, sampler)

    shown = drawn(study)
    assert len(shown) == 24
    for params in shown:
        low, high = (1e-3, 1e-2) if params["lora.target_modules"] == '["q_proj"]' else (1e-5, 1e-3)
        assert low <= float(str(params["optim.lr"])) <= high
        assert ("optim.decay_ratio" in params) == (params["optim.schedule"] == "wsd")
    assert {params["lora.target_modules"] for params in shown} == {'["q_proj"]', "all-linear"}


def test_tpe_learns_a_range_from_the_trials_that_have_it(tmp_path: Path) -> None:
    """The simulated perplexity is lowest at 1e-3: an end of either range."""
    shown = drawn(searched(tmp_path, n_trials=40))

    late = [float(str(params["optim.lr"])) for params in shown[20:]]
    assert sum(3e-4 < rate < 3e-3 for rate in late) > 0.6 * len(late)


def test_an_interrupted_sweep_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    whole = drawn(searched(tmp_path / "a"))
    searched(tmp_path / "b", n_trials=9)

    assert drawn(searched(tmp_path / "b"))[:9] == whole[:9]


def test_no_point_comes_twice_and_all_are_tried(tmp_path: Path) -> None:
    space = {"optim": {key: SPACE["optim"][key] for key in ("schedule", "decay_ratio")}}
    config = replace(config_of(tmp_path, "grid", n_trials=9), space=space)
    study = open_study(config, tmp_path)
    simulate(study)

    shown = drawn(study)
    assert len(shown) == study.space.num_points == 4
    assert all(one != other for one, other in itertools.combinations(shown, 2))
    assert "exhausted" in study.study.user_attrs


def test_ranges_and_choices_of_a_branch_may_grow_and_a_new_choice_may_have_its_own(tmp_path: Path) -> None:
    first = searched(tmp_path, n_trials=12)
    before = drawn(first)
    study = open_study(replace(config_of(tmp_path, n_trials=40), space=WIDER), tmp_path)
    assert asked_of_the_dashboard(study) == asked_of_the_dashboard(first)

    simulate(study)

    assert drawn(study)[:12] == before
    assert any("optim.decay_ratio[optim.schedule=wsd]: choice of 0.1" in text for text in study.changes)
    new = [params for params in drawn(study)[12:] if params["lora.target_modules"] == '["v_proj"]']
    assert new
    assert all(5e-3 <= float(str(params["optim.lr"])) <= 6e-3 for params in new)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("lr", LR.format("2e-3", ""), 'lr[lora.target_modules=["q_proj"]]: 0.001 to 0.01, log -> 0.002'),
        ("lr", "tag(log, interval(1e-3, 1e-2))", "space.optim.lr: not set -> 0.001 to 0.01, log"),
        (
            "decay_ratio",
            "when(lora.target_modules, all-linear, choice(0.1))",
            "decay_ratio[lora.target_modules=all-linear]: not",
        ),
    ],
)
def test_other_conditions_are_another_study(tmp_path: Path, key: str, text: str, words: str) -> None:
    first = searched(tmp_path, n_trials=4)
    space = {"lora": SPACE["lora"], "optim": {**SPACE["optim"], key: text}}

    with pytest.raises(FingerprintError) as caught:
        open_study(replace(first.config, space=space), tmp_path)

    assert words in str(caught.value)


def test_the_report_shows_trials_without_a_key_too(tmp_path: Path) -> None:
    study = searched(tmp_path)
    rows = study.rows()

    drawing = parallel(rows, rows[0], ["optim.schedule", "optim.decay_ratio", "optim.lr"], 20.0)

    assert drawing.count('<path class="line') == len(rows)
    assert ABSENT in drawing
    by_key = {one.key: one for one in importances(rows)}
    num_wsd = sum("optim.decay_ratio" in row.params for row in rows)
    assert by_key["optim.decay_ratio"].trials == num_wsd < len(rows)
    assert [params_of(trial) for trial in study.study.get_trials()] == [row.params for row in rows]
