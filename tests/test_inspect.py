"""Looking at rows before training, and training on chats: the same rows, the same mask."""

import json
from pathlib import Path

import pytest

from lora_search.data.rows import Pair
from lora_search.inspect import main
from lora_search.inspection import cut_table, histogram, page, shown_row
from lora_search.settings.schema import DataConfig, EngineConfig, ModelConfig, SweepConfig, TrainConfig
from lora_search.training import train

MORE = [{"role": "user", "content": "Why <b>?"}, {"role": "assistant", "content": "Rain \x1b[31m."}]


def chats(path: Path) -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Roof {i}?"},
                {"role": "assistant", "content": "Yes."},
                *MORE,
            ]
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_inspect_says_what_a_run_would_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "rows.html"
    command = [
        "inspect",
        "-cn",
        "smoke",
        f"data.path={chats(tmp_path / 'chat.jsonl')}",
        "--html",
        str(written),
    ]
    monkeypatch.setattr("sys.argv", [*command, "data.max_length=512"])
    monkeypatch.chdir(tmp_path)

    assert main() == 0

    said = capsys.readouterr().out
    assert "chat.jsonl: messages: messages" in said
    assert "40 rows read" in said
    assert "<|im_start|>assistant\nYes.<|im_end|>" in said
    assert "\x1b[31m" not in said
    text = written.read_text()
    assert "<mark>Yes.&lt;|im_end|&gt;</mark>" in text
    assert "<b>" not in text
    assert not (tmp_path / "runs").exists()


def test_inspect_refuses_as_a_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["inspect", "-cn", "smoke", f"data.path={tmp_path}/none.jsonl"])

    assert main() == 2
    assert "data.path: " in capsys.readouterr().out


def test_the_histogram_counts_every_row_and_the_table_what_is_cut() -> None:
    lengths = [1, 5, 200, 130, 600]

    assert sum(int(line.split()[-1]) for line in histogram(lengths)) == 5
    assert cut_table(lengths)[:2] == [
        "data.max_length=128    cuts 3 of 5 rows, 58.3% of the tokens",
        "data.max_length=256    cuts 1 of 5 rows, 36.8% of the tokens",
    ]


def test_a_page_marks_what_is_learnt() -> None:
    row = shown_row(Pair("Ask & ", "one|two|three", ((3, 8),)), 9)

    assert "Ask &amp; <mark>one</mark>|two|<mark>three</mark>" in page("T", [], [9], [row])


@pytest.mark.parametrize("loss_on", ["all_assistant_turns", "last_turn", "all_tokens"])
def test_trials_train_on_chats_end_to_end(tiny_llama: Path, tmp_path: Path, loss_on: str) -> None:
    config = SweepConfig(
        model=ModelConfig(path=str(tiny_llama)),
        data=DataConfig(path=chats(tmp_path / "chat.jsonl"), validation_fraction=0.2),
        train=TrainConfig(epochs=2, evals_per_epoch=1, batch_size=4, loss_on=loss_on),
        engine=EngineConfig(device="cpu", dtype="float32", slots=2, tokens_per_pass=512),
    )

    measured = list(train(config, [{"optim.lr": 5e-3}, {"optim.lr": 1e-4}], tmp_path / "runs"))

    first = [m.perplexity for m in measured if m.trial_number == 0]
    assert first[-1] < first[0] < 400
    assert {m.ended for m in measured if m.rung == 2} == {"finished"}
    masked = ["masked" in line for line in (tmp_path / "runs/data/train.jsonl").read_text().splitlines()]
    assert all(masked) if loss_on != "last_turn" else not any(masked)
