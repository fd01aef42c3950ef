"""The best folder holds one trial: its adapter, its settings, and commands that work as they are written."""

import ast
import json
import logging
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, example, given, settings, strategies

from lora_search.output.best_folder import export_best, retrain_command
from lora_search.results.record import StudyRecord
from lora_search.settings.composition import compose
from lora_search.settings.overlay import trial_settings
from lora_search.settings.space import parse_space
from lora_search.trial import TrialRow
from tests.rows import ATTRIBUTES, BEST, ROWS, make_row

SMOKE = "python -m lora_search.sweep -cn smoke"


def is_regex(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except re.error:
        return False


def write_adapter(folder: Path, number: int) -> None:
    adapter = folder / "trials" / str(number) / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(f'{{"trial": {number}}}')
    (adapter / "adapter_model.safetensors").write_bytes(bytes([number]))


def retrained(best: TrialRow, *, command: str) -> list[str]:
    """Return the overrides that the printed command gives to Hydra."""
    words = shlex.split(retrain_command(best, {**ATTRIBUTES, "command": command}, "faq"))
    assert words[:3] == ["python", "-m", "lora_search.sweep"]
    return words[3:]


def test_the_best_adapter_is_copied_file_by_file(tmp_path: Path) -> None:
    for row in ROWS[:6]:
        write_adapter(tmp_path, row.number)

    folder = export_best(StudyRecord(ROWS, ATTRIBUTES, tmp_path))

    assert folder == tmp_path / "best"
    assert sorted(path.name for path in folder.rglob("*")) == [
        "adapter", "adapter_config.json", "adapter_model.safetensors", "reproduce.md", "settings.json",
    ]  # fmt: skip
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == bytes([BEST.number])


def test_settings_hold_the_sweeps_settings_with_the_trials_laid_over(tmp_path: Path) -> None:
    write_adapter(tmp_path, BEST.number)
    folder = export_best(StudyRecord(ROWS, ATTRIBUTES, tmp_path))

    assert folder is not None
    stored = json.loads((folder / "settings.json").read_text())
    assert (stored["trial"], stored["perplexity"], stored["rung"]) == (5, 8.5, 12)
    assert stored["params"] == {
        "lora.r": 32,
        "optim.lr": BEST.params["optim.lr"],
        "lora.target_modules": "all-linear",
    }
    assert stored["settings"]["lora.r"] == 32
    assert stored["settings"]["lora.dropout"] == 0.05


def test_a_new_best_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    write_adapter(tmp_path, BEST.number)
    export_best(StudyRecord(ROWS, ATTRIBUTES, tmp_path))
    (tmp_path / "best" / "adapter" / "of_the_old_one").touch()
    write_adapter(tmp_path, 16)

    folder = export_best(StudyRecord([*ROWS, make_row(16, best=7.5)], ATTRIBUTES, tmp_path))

    assert folder is not None
    assert json.loads((folder / "settings.json").read_text())["trial"] == 16
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "trials"]


def test_what_an_interrupted_export_left_is_cleared(tmp_path: Path) -> None:
    write_adapter(tmp_path, BEST.number)
    (tmp_path / "best.new" / "adapter").mkdir(parents=True)
    (tmp_path / "best.old").mkdir()

    export_best(StudyRecord(ROWS, ATTRIBUTES, tmp_path))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "trials"]


def test_without_a_complete_trial_nothing_is_written(tmp_path: Path) -> None:
    rows = [make_row(0, "PRUNED", 9.0), make_row(1, "FAIL", None)]

    assert export_best(StudyRecord(rows, ATTRIBUTES, tmp_path)) is None
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_another_machine_is_said_and_keeps_the_older_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(tmp_path, BEST.number)
    export_best(StudyRecord(ROWS, ATTRIBUTES, tmp_path))

    with caplog.at_level(logging.WARNING):
        folder = export_best(StudyRecord([*ROWS, make_row(16, best=7.5)], ATTRIBUTES, tmp_path))

    assert folder is None
    assert "trials/16/adapter: the best trial's adapter is not here" in caplog.text
    assert json.loads((tmp_path / "best" / "settings.json").read_text())["trial"] == BEST.number


def test_the_command_trains_exactly_this_trial() -> None:
    params = {"lora.r": 32, "optim.lr": 1.4198570000000002e-3, "lora.target_modules": '["q_proj", "v_proj"]'}
    best = replace(BEST, params=params)
    typed = "python -m lora_search.sweep data.max_train_examples=32 study.n_trials=24 'lora.r=choice(8, 32)'"

    config = compose("construction_faq", retrained(best, command=typed))

    assert (config.lora.r, config.optim.lr) == (32, 1.4198570000000002e-3)
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.data.max_train_examples == 32
    assert (config.study.name, config.study.n_trials) == ("faq-trial-5", 1)
    first = parse_space(config).default_params(config)
    assert first is not None
    assert (first["lora.r"], first["optim.lr"]) == (32, 1.4198570000000002e-3)


WORDS = strategies.text("ab_.0-/|?*+$@%", min_size=1)
REGEXES = strategies.text("ab_.|()[]{}\\'\" ,:=+*?^-0#&!~", min_size=1).map(
    lambda text: f".*{re.escape(text)}"
)
ENDS = WORDS.map("q{}".format).filter(is_regex)
PARAMS = strategies.fixed_dictionaries(
    {},
    optional={
        "lora.target_modules": REGEXES | strategies.lists(REGEXES | WORDS, min_size=1, unique=True),
        "lora.rank_pattern": strategies.dictionaries(ENDS, strategies.integers(1, 64)),
        "lora.layers_to_transform": strategies.sampled_from([None, 0, [3], [1, 30]]),
        "lora.use_rslora": strategies.booleans(),
        "lora.init": strategies.sampled_from(["kaiming", "gaussian", "pissa_niter_4"]),
        "optim.lr": strategies.floats(1e-9, 0.5),
        "train.epochs": strategies.integers(1, 5),
    },
)  # fmt: skip


@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(params=PARAMS)
@example(params={"lora.target_modules": r".*\.layers\.[0-3]\.(q|v)_proj", "lora.rank_pattern": {"q_proj": 8}})
@example(params={"lora.rank_pattern": {}, "lora.target_modules": ["null", "1e-3", "it's", "a,b", "x\\"]})
def test_every_command_composes_to_the_settings_of_its_trial(params: dict[str, object]) -> None:
    kept = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in params.items()}
    best = replace(BEST, params=kept)

    composed = compose("smoke", retrained(best, command=f"{SMOKE} 'lora.rank_pattern={{k_proj:4}}'")[2:])

    given_rank = {"lora.rank_pattern": json.dumps({"k_proj": 4})}
    assert trial_settings(composed, {}) == trial_settings(compose("smoke", []), {**given_rank, **kept})


def test_without_a_recorded_command_the_sweeps_name_is_used() -> None:
    assert retrain_command(BEST, ATTRIBUTES, "faq").startswith(
        "python -m lora_search.sweep -cn construction_faq "
    )


def test_the_loading_code_is_python_that_names_this_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path, BEST.number)
    folder = export_best(StudyRecord(ROWS, ATTRIBUTES, tmp_path))

    assert folder is not None
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "reproduce.md").read_text(), re.DOTALL)
    named = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert {"/models/smollm2", str(folder / "adapter")} <= named
