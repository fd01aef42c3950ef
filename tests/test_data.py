import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from lora_search.config import ColumnsConfig, DataConfig, SweepConfig, TemplateConfig
from lora_search.data import epoch_order, prepare, split
from lora_search.errors import ConfigError, DataError
from lora_search.reading import load_rows
from lora_search.templates import Row, render
from lora_search.tiny import make_tiny_tokenizer

ROWS = [{"instruction": f"Question {i}?", "context": "", "response": f"Answer {i}."} for i in range(60)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(path: Path, **changes: object) -> SweepConfig:
    return SweepConfig(data=DataConfig(path=str(path), **changes))  # type: ignore[arg-type]


def test_the_packaged_pairs_are_all_there() -> None:
    columns = ColumnsConfig(context="input", response="output")

    rows, counts = load_rows(DataConfig(path="construction-faq", columns=columns))

    assert len(rows) == counts["rows read"] == 503
    assert rows[0].instruction == "What is a bygglov (building permit)?"


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path / "faq.jsonl", ROWS)
    table = datasets.Dataset.from_list(ROWS)
    (tmp_path / "faq.json").write_text(json.dumps(ROWS))
    table.to_csv(tmp_path / "faq.csv")
    table.to_parquet(tmp_path / "faq.parquet")
    table.save_to_disk(tmp_path / "folder")

    read = [
        load_rows(DataConfig(path=str(tmp_path / f"faq.{kind}")))[0]
        for kind in ("jsonl", "json", "csv", "parquet")
    ]
    read.append(load_rows(DataConfig(path=str(tmp_path / "folder")))[0])

    assert all(
        [(r.instruction, r.response) for r in rows] == [(r.instruction, r.response) for r in read[0]]
        for rows in read
    )
    assert len(read[0]) == 60


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a", "response": "b"', "line 2 of faq.jsonl is not JSON"),
        (
            '{"instruction": "a", "output": "b"}',
            'line 2 of faq.jsonl has no "response" .*data.columns.response=output',
        ),
        ('{"question": "a", "response": "b"}', 'has no "instruction"'),
        ('{"instruction": "", "response": "b"}', '"instruction" is empty'),
        ('{"instruction": "a", "response": "  "}', '"response" is empty'),
        ('{"instruction": "a", "response": 7}', '"response" is int, not text'),
        ('{"instruction": "a", "response": "b", "context": ["c"]}', '"context" is list, not text'),
        ("[1, 2]", "is a list, not an object"),
    ],
)
def test_a_bad_line_is_named_with_its_remedy(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "faq.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{line}\n")

    with pytest.raises(DataError, match=message):
        load_rows(DataConfig(path=str(path)))

    rows, counts = load_rows(DataConfig(path=str(path), on_bad_row="skip"))
    assert (len(rows), counts["bad rows skipped"]) == (1, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.jsonl", '{"instruction": "é", "response": "b"}'.encode("latin-1"), "is not UTF-8"),
        ("empty.jsonl", b"", "is empty"),
        ("faq.txt", b"hello", "unknown ending '.txt'"),
        ("broken.parquet", b"hello", "cannot be read"),
    ],
)
def test_a_bad_file_is_named_with_its_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=message):
        load_rows(DataConfig(path=str(tmp_path / name)))


def test_a_missing_file_is_answered_with_near_names(tmp_path: Path) -> None:
    write(tmp_path / "faq.jsonl", ROWS)

    with pytest.raises(DataError, match=r"does not exist. Did you mean faq.jsonl\?"):
        load_rows(DataConfig(path=str(tmp_path / "faqs.jsonl")))


def test_duplicates_go_and_no_question_stands_on_both_sides(tmp_path: Path) -> None:
    doubled = [*ROWS, *ROWS[:5], *({**row, "response": "Another."} for row in ROWS)]
    config = config_for(write(tmp_path / "faq.jsonl", doubled))

    splits = prepare(config, load_rows(config.data), make_tiny_tokenizer(), tmp_path / "data")

    assert splits.counts["exact duplicates removed"] == 5
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 120
    prompts = [
        {
            json.loads(line)["prompt"]
            for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()
        }
        for name in ("train", "validation", "test")
    ]
    assert sum(len(p) for p in prompts) == len(set.union(*prompts)) == 60


def test_a_row_keeps_its_split_when_others_are_added() -> None:
    rows = [Row(f"Question {i}?", "", "Yes.", "") for i in range(200)]

    small, large = split(rows[:100], DataConfig(), 3), split(rows, DataConfig(), 3)

    for name in ("train", "validation", "test"):
        assert set(small[name]) <= set(large[name])
        assert small[name] == [row for row in large[name] if row in set(small[name])]


def test_lengths_are_cut_and_counted(tmp_path: Path) -> None:
    rows = [*ROWS, {"instruction": "Q" * 400, "response": "A"}]
    config = config_for(write(tmp_path / "faq.jsonl", rows), max_length=70, test_fraction=0.0)

    splits = prepare(config, load_rows(config.data), make_tiny_tokenizer(), tmp_path / "data")

    assert max(len(e.input_ids) for e in splits.train) <= 70
    assert sum(count for key, count in splits.counts.items() if "prompt fills" in key) == 1


def test_auto_length_is_the_percentile_of_the_training_rows(tmp_path: Path) -> None:
    config = config_for(write(tmp_path / "faq.jsonl", ROWS), max_length_percentile=100)

    splits = prepare(config, load_rows(config.data), make_tiny_tokenizer(), tmp_path / "data")

    longest = max(len(e.input_ids) for e in splits.train)
    assert splits.max_length == -(-longest // 8) * 8
    assert not any("truncated" in key for key in splits.counts)


def test_the_chat_template_teaches_the_end_token_and_masks_the_prompt(tmp_path: Path) -> None:
    row, tokenizer = Row("Why?", "Because.", "So.", ""), make_tiny_tokenizer()

    pair = render(row, TemplateConfig(), tokenizer)

    assert pair.prompt == "<|im_start|>user\nWhy?\n\nBecause.<|im_end|>\n<|im_start|>assistant\n"
    assert pair.completion == "So.<|im_end|>"


def test_the_plain_schema_is_offered_for_models_without_a_template() -> None:
    row, tokenizer = Row("Why?", "", "So.", ""), make_tiny_tokenizer()
    tokenizer.chat_template = None

    assert render(row, TemplateConfig(name="inst"), tokenizer).completion == " So.<|im_end|>"
    assert "[INST] Why? [/INST]" in render(row, TemplateConfig(name="inst"), tokenizer).prompt
    with pytest.raises(ConfigError, match="template=inst"):
        render(row, TemplateConfig(), tokenizer)


def test_every_epoch_has_its_own_order_for_all_trials() -> None:
    assert epoch_order(20, 1, 0) == epoch_order(20, 1, 0)
    assert epoch_order(20, 1, 0) != epoch_order(20, 1, 1)
    assert Counter(epoch_order(20, 1, 1)) == Counter(range(20))
