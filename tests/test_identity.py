"""Everything that can change between two starts of one study: refused with its name, or listed as free."""

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file

from lora_search.database.storage import open_storage
from lora_search.errors import LoraSearchError, ModelError
from lora_search.model.tiny import make_tiny_model
from lora_search.output.terminal import Progress
from lora_search.prepare import prepare_sweep
from lora_search.settings.composition import compose
from lora_search.settings.schema import StudyConfig, SweepConfig, as_dict
from lora_search.settings.space import parse_space
from lora_search.study.fingerprint import FREE, FREE_SECTIONS, check_fingerprint, flat, settings_part
from lora_search.study.identity import find_identity, give_identity
from lora_search.study.study import SweepStudy

NUM_ROWS = 30


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def begin(folder: Path, *overrides: str, model: str = "") -> SweepStudy:
    """Start the study as `python -m lora_search.sweep` does, up to the first trial."""
    settings = [
        "study.name=faq", f"study.storage=sqlite:///{folder}/study.db", f"runs_dir={folder}/runs",
        "data=jsonl", f"data.path={folder}/rows.jsonl", f"model.path={model or folder / 'model'}",
        "engine.device=cpu", "engine.slots=1",
    ]  # fmt: skip
    config = compose("smoke", [*settings, *overrides])
    return prepare_sweep(config, "smoke", parse_space(config), Progress())[1]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was begun, its model and its rows in one folder."""
    folder = tmp_path_factory.mktemp("begun")
    make_tiny_model(folder / "model")
    rows = [{"instruction": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(NUM_ROWS)]
    write_rows(folder / "rows.jsonl", rows)
    begin(folder)
    return folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """The same study in a place of its own."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        key = "select key, value_json from study_user_attributes where key = 'fingerprint'"
        ((_, text),) = connection.execute(key)
        moved = text.replace(str(begun), str(tmp_path))
        connection.execute(
            "update study_user_attributes set value_json = ? where key = 'fingerprint'", (moved,)
        )
    return tmp_path


def change_weights(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, path, {"format": "pt"})


def change_weights_and_hide_it(folder: Path) -> None:
    """As `cp -p` or `rsync -t` do: the same size, the same time."""
    path = folder / "model/model.safetensors"
    before = path.stat()
    change_weights(folder)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def change_config(folder: Path) -> None:
    path = folder / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-5}))


def change_tokenizer(folder: Path) -> None:
    path = folder / "model/tokenizer.json"
    rules = json.loads(path.read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(rules))


def change_template(folder: Path) -> None:
    path = folder / "model/chat_template.jinja"
    source = path.read_text()
    path.write_text(source.replace("assistant\n", "assistant:\n").replace("['role'] }}", "['role'] }}:"))


def change_row(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text(path.read_text().replace("It is 8.", "It is 9."))


def indent_answer(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text(path.read_text().replace('"It is 8."', '"    It is 8."'))


def add_row(folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"instruction": "And now?", "response": "Now."}\n')


def take_row_away(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (change_weights, "the weights of model.path changed"),
    (change_weights_and_hide_it, "the weights of model.path changed"),
    (change_config, "config.json of model.path changed"),
    (change_tokenizer, "the tokenizer of model.path changed"),
    (change_template, "the chat template of model.path changed"),
    (change_row, "the rows of data.path changed"),
    (indent_answer, "the rows of data.path changed"),
    (add_row, "the rows of data.path changed"),
    (take_row_away, "the rows of data.path changed"),
]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[change.__name__ for change, _ in REFUSED])
def test_a_changed_input_is_named_and_nothing_is_written(
    folder: Path, change: Callable[[Path], None], words: str
) -> None:
    change(folder)
    before = content(folder)

    with pytest.raises(LoraSearchError) as caught:
        begin(folder)

    lines = str(caught.value).splitlines()
    assert caught.value.exit_code == 2
    assert lines[0] == "study.name: 'faq' was started with other settings or inputs:"
    assert lines[1:-1] == [f"  {words}"]  # the cause alone, without what follows from it
    assert lines[-1] == f"Choose a new study.name, or restore these. {FREE}"
    assert content(folder).items() >= {k: v for k, v in before.items() if "study.db" not in k}.items()


def reorder_rows(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def touch_everything(folder: Path) -> None:
    for path in [*(folder / "model").iterdir(), folder / "rows.jsonl"]:
        path.touch()


def change_generation(folder: Path) -> None:
    (folder / "model/generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')


def rename_in_config(folder: Path) -> None:
    path = folder / "model/config.json"
    told = {"transformers_version": "4.0", "_name_or_path": "elsewhere"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))


def damage_cache(folder: Path) -> None:
    for path in (folder / "cache/digests").glob("*"):
        path.write_bytes(b'{"sha256": 1')


FREE_INPUTS = [reorder_rows, touch_everything, change_generation, rename_in_config, damage_cache]


@pytest.mark.parametrize("change", FREE_INPUTS)
def test_what_changes_no_number_is_free(
    folder: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(folder / "cache"))
    change(folder)

    assert begin(folder).changes == []


FREE_SETTINGS = [
    "study.n_trials=3", "study.heartbeat_seconds=7", "engine.slots=2", "engine.tokens_per_pass=64",
    "engine.gradient_checkpointing=true", "tracker=none", "launcher.max_restarts=1",
    "data.on_control_text=keep", "data.on_bad_row=skip",
]  # fmt: skip


def test_free_settings_may_differ_at_every_start(folder: Path) -> None:
    told = [begin(folder, *FREE_SETTINGS).changes, begin(folder).changes]

    noted = {"data.on_bad_row": ("refuse", "skip"), "data.on_control_text": ("refuse", "keep")}
    assert told[0] == [f"{key}: {one} -> {other}" for key, (one, other) in noted.items()]
    assert told[1] == [f"{key}: {other} -> {one}" for key, (one, other) in noted.items()]


def test_rows_may_lie_elsewhere_if_they_are_the_same(folder: Path) -> None:
    shutil.move(folder / "rows.jsonl", folder / "moved.jsonl")

    study = begin(folder, f"data.path={folder}/moved.jsonl")

    assert study.changes == [f"data.path: {folder}/rows.jsonl -> {folder}/moved.jsonl"]


def test_float32_products_in_less_precision_are_refused() -> None:
    stored = {**settings_part(SweepConfig()), "content.float32_matmul": torch.get_float32_matmul_precision()}

    with pytest.raises(LoraSearchError, match="\n  float32_matmul: highest -> high\n"):
        check_fingerprint("faq", stored, {**stored, "content.float32_matmul": "high"})


def test_the_dtype_that_auto_came_to_is_compared(folder: Path) -> None:
    with pytest.raises(LoraSearchError, match="engine.dtype: float32 -> bfloat16"):
        begin(folder, "engine.dtype=bfloat16")


def leaves(section: str) -> list[str]:
    return list(flat(section, as_dict(SweepConfig())[section]))


SECTIONS = {
    "seed", "runs_dir", "study", "model", "data", "template", "lora", "optim", "train", "engine", "sampler",
    "pruner", "tracker", "launcher", "space",
}  # fmt: skip


@pytest.mark.parametrize("section", sorted(as_dict(SweepConfig()).keys() - set(FREE_SECTIONS)))
def test_each_setting_that_counts_is_refused_by_its_name(section: str) -> None:
    stored = {**settings_part(SweepConfig()), "data_hash": "x", "content.train": "y"}
    keys = leaves(section)

    for key in keys:
        wanted = {**stored, key: "other", "data_hash": "z"}
        with pytest.raises(LoraSearchError, match=f"\n  {key}: .* -> other\n"):
            check_fingerprint("faq", stored, wanted)
    assert keys


def test_every_section_counts_or_is_told_to_be_free() -> None:
    assert set(as_dict(SweepConfig())) >= SECTIONS
    assert {key.partition(".")[0] for key in settings_part(SweepConfig())}.isdisjoint(FREE_SECTIONS)
    assert all(section in FREE for section in FREE_SECTIONS if section != "space")
    assert "space" in FREE


# Whose study, whose folder.


def test_of_many_starts_at_once_one_gives_the_id(tmp_path: Path) -> None:
    config = StudyConfig(name="s", storage=f"sqlite:///{tmp_path}/study.db")
    open_storage(config).create_new_study([1], "s")  # type: ignore[list-item]
    gate, told = threading.Barrier(6), []

    def start(number: int) -> None:
        storage = open_storage(config)
        gate.wait()
        told.append(give_identity(storage, "s", {"seed": str(number)}))

    threads = [threading.Thread(target=start, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(told) == 6
    assert len({identity.id for identity in told}) == 1
    assert len({str(identity.fingerprint) for identity in told}) == 1
    assert not any(identity.is_older for identity in told)


@pytest.mark.parametrize("has_marker", [True, False])
def test_a_new_database_over_an_old_runs_folder_is_refused_with_the_ways_out(
    folder: Path, has_marker: bool
) -> None:
    (folder / "study.db").unlink()
    if not has_marker:
        (folder / "runs/faq/study.json").unlink()
    before = content(folder)

    with pytest.raises(LoraSearchError) as caught:
        begin(folder, "data.max_train_examples=20", "template.system_prompt=Be brief.")

    assert caught.value.exit_code == 2
    assert "study.name: must not name another study's folder" in str(caught.value)
    ways_out = "Choose another study.name or runs_dir, give that study's study.storage, or delete"
    assert f"{ways_out} {folder}/runs/faq." in str(caught.value)
    assert content(folder) == before


def test_two_studies_of_one_name_have_two_ids_and_each_its_own_folder(folder: Path) -> None:
    other = begin(folder, f"study.storage=sqlite:///{folder}/other.db", f"runs_dir={folder}/others")
    first = find_identity(StudyConfig(name="faq", storage=f"sqlite:///{folder}/study.db"))
    assert first is not None

    with pytest.raises(LoraSearchError, match=f"belongs to another study of that name \\(id {first.id}, not"):
        begin(folder, f"study.storage=sqlite:///{folder}/other.db")

    (run,) = other.claim(1)
    assert run.study_id == other.identity.id != first.id


@pytest.mark.parametrize("marker", [b"", b"{", b"[1]", b'{"id": 7}', b"\xff\xfe"])
def test_a_damaged_marker_is_refused_and_says_what_to_write(folder: Path, marker: bytes) -> None:
    path = folder / "runs/faq/study.json"
    whole = path.read_bytes()
    path.write_bytes(marker)

    with pytest.raises(LoraSearchError, match="has a damaged study.json") as caught:
        begin(folder)

    path.write_text(str(caught.value).partition(" write ")[2].partition(" to ")[0])
    begin(folder)
    assert json.loads(path.read_text())["id"] == json.loads(whole)["id"]


def test_the_same_study_may_use_another_runs_folder(folder: Path) -> None:
    begin(folder, f"runs_dir={folder}/elsewhere")

    markers = [folder / name / "faq/study.json" for name in ("runs", "elsewhere")]
    assert json.loads(markers[0].read_text()) == json.loads(markers[1].read_text())


# A hub id stays at its commit. Offline, in a cache laid out as huggingface_hub does.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    repo = tmp_path / "hub/models--org--name"
    for seed, commit in ((0, "a" * 40), (1, "b" * 40)):
        make_tiny_model(repo / "snapshots" / commit, seed=seed)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("a" * 40)
    (repo / "refs/next").write_text("b" * 40)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    rows = [{"instruction": f"What is {i}?", "response": f"It is {i}."} for i in range(NUM_ROWS)]
    write_rows(tmp_path / "rows.jsonl", rows)
    return repo


def test_a_hub_id_stays_at_the_commit_it_was_resolved_to_first(cache: Path, tmp_path: Path) -> None:
    first = begin(tmp_path, model="org/name").attributes()
    (cache / "refs/main").write_text("b" * 40)

    again = begin(tmp_path, model="org/name").attributes()
    new = begin(tmp_path, "study.name=new", model="org/name").attributes()

    assert [a["base_revision"] for a in (first, again, new)] == ["a" * 40, "a" * 40, "b" * 40]
    assert first["base_perplexity"] == again["base_perplexity"] != new["base_perplexity"]
    assert first["base_weights"] == again["base_weights"] != new["base_weights"]


def test_another_revision_is_refused_by_its_name(cache: Path, tmp_path: Path) -> None:
    begin(tmp_path, model="org/name")

    with pytest.raises(LoraSearchError, match="model.revision: None -> next"):
        begin(tmp_path, "model.revision=next", model="org/name")


def test_a_commit_that_is_not_there_any_more_is_named(cache: Path, tmp_path: Path) -> None:
    begin(tmp_path, model="org/name")
    (cache / "refs/main").write_text("b" * 40)
    shutil.rmtree(cache / "snapshots" / ("a" * 40))

    with pytest.raises(ModelError, match=f"nor in the hub's cache at revision {'a' * 40}"):
        begin(tmp_path, model="org/name")


def test_weights_replaced_in_the_hubs_cache_are_noticed(cache: Path, tmp_path: Path) -> None:
    begin(tmp_path, model="org/name")
    ours, other = (cache / f"snapshots/{c * 40}/model.safetensors" for c in "ab")
    ours.unlink()
    shutil.copy(other, ours)

    with pytest.raises(LoraSearchError, match="\n  the weights of model.path changed\n"):
        begin(tmp_path, model="org/name")
