"""What is refused before a model is loaded, and what people are told of the search."""

import json
import math
import os
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_search.data.control_tokens import control_tokens_of
from lora_search.data.order import DataAxis
from lora_search.data.rows import Example, Splits
from lora_search.data.store import used_tokens
from lora_search.data.tokens import LENGTH
from lora_search.engine.effect_checks import check_rates, note_untied, warn_of_few, warn_of_untrained
from lora_search.errors import ConfigError, LoraSearchError, ModelError
from lora_search.model.loading import load_base, resolve_model
from lora_search.model.tiny import CHATML, make_tiny_model, make_tiny_tokenizer
from lora_search.output.terminal import Progress
from lora_search.prepare import (
    check_amount,
    check_places,
    describe_rows,
    describe_search,
    prepare_sweep,
)
from lora_search.settings.composition import compose
from lora_search.settings.schema import EngineConfig, ModelConfig
from lora_search.settings.space import parse_space
from tests.engine.test_architectures import make_model


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match="runs_dir: must be a writable folder .*Not a directory"):
        check_places(compose("smoke", [f"runs_dir={tmp_path}/file"]))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///", "study.storage: must name a file, so that the study is kept"),
        ("sqlite:///:memory:", "study.storage: must name a file, so that the study is kept"),
        ("redis://localhost", "study.storage: must be a SQL URL of a known kind, got 'redis://localhost'"),
        (
            "postgresql+psycopg://u:secret@localhost:1/db",
            "study.storage: postgresql.*:\\*\\*\\*@.*cannot be used",
        ),
        (
            "sqlite:///notes.txt",
            r"study.storage: must be an SQLite database \(file is not a database\), got .notes.txt.",
        ),
    ],
)
def test_a_database_that_cannot_be_used_is_refused(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no database at all, but long enough to be looked at as one\n" * 20)

    with pytest.raises(LoraSearchError, match=message):
        check_places(compose("smoke", [f"study.storage='{url}'"]))


def test_looking_at_a_database_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    check_places(compose("smoke", []))

    assert not Path("runs/lora_search.db").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [],
            "train.batch_size: must be at most the number of training examples, 7, got 8. Lower it, or give",
        ),
        (
            ["train.gradient_accumulation_steps=2", "train.batch_size=choice(2,4)"],
            r"train.batch_size \* train.gradient_accumulation_steps: must be at most .* 7, got 8",
        ),
        (
            ["train.evals_per_epoch=8", "train.batch_size=choice(2,4)"],
            "train.evals_per_epoch: must be at most the number of training examples, 7, got 8",
        ),
    ],
)
def test_data_too_small_for_one_step_or_one_rung_is_refused(overrides: list[str], message: str) -> None:
    config = compose("smoke", overrides)

    with pytest.raises(ConfigError, match=message):
        check_amount(config, parse_space(config), 7)


EIGHT = DataAxis((Example((1, 2), 1),) * 8, 0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.batch_size=8", "optim.warmup_ratio=0.05"],
        ["train.batch_size=choice(2,8)", "optim.warmup_ratio=0.05"],
        ["train.batch_size=range(2,9,2)", "train.epochs=choice(1,3)", "optim.warmup_ratio=0.05"],
        ["train.batch_size=8", "optim.warmup_ratio=interval(0.0,0.1)"],
        ["train.batch_size=2", "train.gradient_accumulation_steps=choice(1,4)", "optim.warmup_ratio=0.1"],
        ["train.batch_size=8", "optim.warmup_ratio=0.1", "optim.schedule=choice(constant,linear)"],
    ],
)
def test_a_space_in_which_a_trial_would_train_nothing_is_refused(overrides: list[str]) -> None:
    config = compose("smoke", ["space.train.batch_size=null", "train.epochs=1", *overrides])
    message = r"^optim.warmup_ratio: must leave a step .*8 training examples in steps of 8, 1 epoch\)"

    with pytest.raises(ConfigError, match=message):
        check_rates(config, parse_space(config), EIGHT)


@pytest.mark.parametrize(("steps", "batch"), [("4", "2"), ("choice(1,9)", "2"), ("2", "choice(2,8)")])
def test_a_warm_up_that_a_trial_does_not_outlast_is_refused(steps: str, batch: str) -> None:
    overrides = ["space.train.batch_size=null", f"optim.warmup_steps={steps}", f"train.batch_size={batch}"]
    config = compose("smoke", ["train.epochs=1", *overrides])
    message = r"^optim.warmup_steps: must be below the optimizer steps of each trial, .*8 training examples"

    with pytest.raises(ConfigError, match=message):
        check_rates(config, parse_space(config), EIGHT)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.batch_size=8", "optim.warmup_ratio=0"],
        ["train.batch_size=8", "train.epochs=2", "optim.warmup_ratio=0.05"],
        ["train.batch_size=4", "optim.warmup_ratio=1.0"],
        ["train.batch_size=choice(2,4)", "optim.schedule=choice(constant,linear,cosine)"],
    ],
)
def test_a_space_in_which_every_trial_learns_passes(overrides: list[str]) -> None:
    config = compose("smoke", ["space.train.batch_size=null", "train.epochs=1", *overrides])

    check_rates(config, parse_space(config), EIGHT)


@pytest.mark.parametrize(("rows", "unseen"), [(1, "7.6%"), (4, "3.8%"), (14, "2.0%")])
def test_few_validation_rows_are_warned_about_with_the_number_that_would_do(rows: int, unseen: str) -> None:
    (warning,) = warn_of_few(rows)

    assert warning.startswith(
        f"warning: with {rows} validation row(s), perplexities that differ by less than"
    )
    assert f"about {unseen} cannot be told apart; 128 rows would show 0.7%" in warning


def test_enough_validation_rows_are_not_warned_about() -> None:
    assert warn_of_few(128) == warn_of_few(1000) == []


def test_control_tokens_that_the_base_never_learned_are_warned_about(tmp_path: Path) -> None:
    folder, tokenizer = make_tiny_model(tmp_path), make_tiny_tokenizer()
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids("<|im_start|>")] = 0
    weights["lm_head.weight"][tokenizer.convert_tokens_to_ids("<|im_end|>")] = 0
    weights["lm_head.weight"][tokenizer.convert_tokens_to_ids("<|endoftext|>")] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    examples = [Example(tuple(tokenizer("<|im_start|>a<|im_end|>")["input_ids"]), 1)]
    config = ModelConfig(path=str(folder))
    base = load_base(resolve_model(config), config, EngineConfig(device="cpu"))

    (warning,) = warn_of_untrained(base, control_tokens_of(used_tokens([examples]), tokenizer))

    assert "never learned the control tokens <|im_start|>, <|im_end|>: their embeddings are zero" in warning
    assert warning.endswith("trainable_token_indices=[1,2] lora.trainable_token_head=true")


def test_trials_may_train_the_control_tokens_of_a_tied_base(tmp_path: Path) -> None:
    tokenizer, config = make_tiny_tokenizer(), make_model(tmp_path, "qwen2", tie_word_embeddings=True)
    weights, end = load_file(tmp_path / "model.safetensors"), tokenizer.convert_tokens_to_ids("<|im_end|>")
    weights["model.embed_tokens.weight"][end] = 0
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    base = load_base(resolve_model(config), config, EngineConfig(device="cpu"))
    tokens = {end: "<|im_end|>"}

    (warning,) = warn_of_untrained(base, tokens, [((7, end), False), ((7,), False)])

    assert warning.endswith(f"or train them: lora.trainable_token_indices=[{end},7]")
    assert warn_of_untrained(base, tokens, [((7, end), False), ((end,), False)]) == []
    both = ("embed_tokens", "lm_head")
    assert warn_of_untrained(base, tokens, [((), False)], [both, ("embed_tokens",)]) != []
    assert warn_of_untrained(base, tokens, [((), False)], [both]) == []
    assert note_untied(base, [()]) == []
    assert "is tied to its embedding, and a copy of either is not" in note_untied(base, [(), both])[0]


def test_learned_control_tokens_are_not_warned_about(tiny_llama: Path) -> None:
    tokenizer, config = make_tiny_tokenizer(), ModelConfig(path=str(tiny_llama))
    base = load_base(resolve_model(config), config, EngineConfig(device="cpu"))
    examples = [Example(tuple(tokenizer("<|im_start|>a<|im_end|>")["input_ids"]), 1)]

    assert warn_of_untrained(base, control_tokens_of(used_tokens([examples]), tokenizer)) == []


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare_smoke(*overrides: str) -> None:
    config = compose("smoke", ["engine.device=cpu", *overrides])
    prepare_sweep(config, "smoke", parse_space(config), Progress())


def test_a_wrong_target_is_refused_without_reading_the_weights(in_a_folder_of_its_own: Path) -> None:
    folder = make_tiny_model(in_a_folder_of_its_own / "model")
    make_huge(folder)

    with pytest.raises(
        ModelError, match="lora.target_modules: the model has no layer 'w_proj'. There are: down"
    ):
        prepare_smoke(f"model.path={folder}", "lora.target_modules=[q_proj,w_proj]")
    with pytest.raises(ModelError, match="lora.target_modules: the model has no layer 'x_proj'"):
        prepare_smoke(f"model.path={folder}", "lora.target_modules=choice([q_proj],[x_proj])")

    assert not Path("runs/lora_search.db").exists()


def make_huge(folder: Path) -> None:
    """Give the model a vocabulary of 40 million tokens: 20 GB of weights, in a file that is a hole."""
    path, rows = folder / "model.safetensors", 40_000_000
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    shapes = {name: list(weight.shape) for name, weight in load_file(path).items()}
    shapes |= {name: [rows, 64] for name, shape in shapes.items() if shape[0] > 300}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def test_a_token_without_an_embedding_is_refused_by_name(in_a_folder_of_its_own: Path) -> None:
    folder = make_tiny_model(in_a_folder_of_its_own / "model")
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.chat_template = f"<|tool|>{CHATML}"
    tokenizer.save_pretrained(folder)
    known = len(make_tiny_tokenizer())

    message = rf"has embeddings for {known} tokens, and its tokenizer gives '<\|tool\|>' the id {known} "
    with pytest.raises(ModelError, match=message):
        prepare_smoke(f"model.path={folder}")

    assert not Path("runs/lora_search.db").exists()


def test_a_value_that_lies_outside_its_range_is_told_of() -> None:
    config = compose("smoke", ["optim.lr=0.9"])

    first, second = describe_search(config, parse_space(config))

    assert first.startswith("searching lora.r choice(8, 16, 32), optim.lr tag(log, interval(5e-5, 5e-3)), ")
    assert second == "optim.lr=0.9 is outside the searched range: the first trial is drawn like the others"


def test_people_are_told_how_long_their_rows_are() -> None:
    config = compose("smoke", [])
    counts = {"rows read": 9, "train": 7, f"{LENGTH} median": 40, f"{LENGTH} longest": 90}
    splits = Splits((), (), (), 64, "hash", counts)

    assert describe_rows(config, splits) == [
        "data construction-faq: 7 train rows",
        "  9 rows read",
        "rows are cut at 64 tokens (data.max_length=128); before that: median 40, longest 90",
    ]
