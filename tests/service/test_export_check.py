"""The check at the end of a sweep: right adapters pass, one that PEFT reads otherwise is refused."""

import json
import re
from pathlib import Path

import pytest
import torch

from lora_search.engine.engine import Engine
from lora_search.engine.evaluation import ROUNDING
from lora_search.errors import StudyError
from lora_search.service.export_check import check_export
from lora_search.trial import TrialRow
from tests.conftest import make_run
from tests.engine.test_architectures import make_model
from tests.harness import build_engine, random_splits, train_all
from tests.rows import make_row

SPLITS = random_splits()


def trained(
    folder: Path, tiny_llama: Path, dtype: str = "float32", **changes: object
) -> tuple[Engine, TrialRow]:
    engine = build_engine(tiny_llama, SPLITS, dtype=dtype)
    train_all(engine, [make_run(folder / "trials", 0, target_modules=("all-linear",), **changes)])
    return engine, make_row(0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"init": "pissa"},
        {"trainable_token_indices": (7, 9)},
        {"rank_pattern": (("q_proj", 8),)},
        {"bias": "lora_only"},
        {"modules_to_save": ("embed_tokens", "lm_head")},
    ],
)
def test_what_was_exported_is_checked_in_one_line(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    base = Path(make_model(tmp_path / "model", "qwen2").path) if "bias" in changes else tiny_llama

    (line,) = check_export(*trained(tmp_path, base, **changes), tmp_path)

    found, expected = re.search(
        r"5 shortest validation rows ([\d.]+) in plain PEFT, ([\d.]+) in the study", line
    ).groups()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_in_16_bits_it_is_a_warning(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROUNDING, torch.bfloat16, 1e-9)
    engine, row = trained(tmp_path, tiny_llama, dtype="bfloat16")

    (line,) = check_export(engine, row, tmp_path)

    assert re.match(
        r"warning: trial 0: .* shortest validation rows a perplexity of [\d.]+ in plain PEFT", line
    )


def test_an_adapter_that_peft_reads_otherwise_is_an_error_with_both_numbers(
    tiny_llama: Path, tmp_path: Path
) -> None:
    engine, row = trained(tmp_path, tiny_llama)
    path = tmp_path / "trials/0/adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 80}))

    with pytest.raises(
        StudyError, match=r"trial 0: .* a perplexity of [\d.]+ in plain PEFT, [\d.]+ in the study"
    ):
        check_export(engine, row, tmp_path)


def test_a_finished_sweep_says_what_plain_peft_gives(smoke_sweep: Path) -> None:
    log = (smoke_sweep / "runs/smoke/sweep.log").read_text()

    assert re.search(
        r"trial \d as exported: perplexity of the \d+ shortest validation rows [\d.]+ in plain PEFT", log
    )
