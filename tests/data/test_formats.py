"""One set of questions in every format and layout gives one set of tokens, split and masked alike."""

import csv
import gzip
import importlib.resources
import json
from functools import cache
from pathlib import Path

import datasets
import openpyxl
import pytest

from lora_search.data.digest import data_content
from lora_search.data.preparation import prepare
from lora_search.model.tiny import make_tiny_tokenizer
from lora_search.reading.load import load_rows
from lora_search.settings.schema import DataConfig, SweepConfig, TemplateConfig

PACKAGED = ("faq-en.csv", "faq-en.json", "faq-en.jsonl", "faq-en-alpaca.jsonl", "faq-en-sharegpt.jsonl")
MADE = (
    "messages.jsonl", "prompts.jsonl", "texts.json", "rows.tsv", "rows.txt", "rows.xlsx", "rows.jsonl.gz",
    "windows.csv", "utf-16.csv", "rows.parquet", "saved",
)  # fmt: skip


def packaged(name: str) -> Path:
    return Path(str(importlib.resources.files("zaragoza_construction_faq") / "data" / name))


@cache
def pairs() -> tuple[tuple[str, str], ...]:
    lines = packaged("faq-en.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple((row["q"], row["a"]) for row in map(json.loads, lines))


def jsonl(rows: list[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_table(path: Path, separator: str, encoding: str = "utf-8") -> None:
    with path.open("w", encoding=encoding, errors="strict", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([("question", "answer"), *pairs()])


def write_excel(path: Path) -> None:
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in [("question", "answer"), *pairs()]:
        sheet.append(row)
    book.save(path)


def write(path: Path) -> None:
    said = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in pairs()]
    columns = [{"question": q, "answer": a} for q, a in pairs()]
    if path.name == "messages.jsonl":
        path.write_text(jsonl([{"messages": turns} for turns in said]))
    elif path.name == "prompts.jsonl":
        path.write_text(jsonl([{"prompt": [ask], "completion": [answer]} for ask, answer in said]))
    elif path.name == "texts.json":
        path.write_text(json.dumps([{"prompt": q, "completion": a} for q, a in pairs()]))
    elif path.suffix == ".xlsx":
        write_excel(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(jsonl(columns).encode()))  # type: ignore[arg-type]
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(columns).to_parquet(path)
    elif path.name == "saved":
        datasets.Dataset.from_list(columns).save_to_disk(path)
    else:
        encoding = {"windows.csv": "utf-8-sig", "utf-16.csv": "utf-16"}.get(path.name, "utf-8")
        write_table(path, {".csv": ";"}.get(path.suffix, "\t"), encoding)


def tokens_of(path: Path) -> dict[str, str]:
    tokenizer, config = make_tiny_tokenizer(), SweepConfig(data=DataConfig(path=str(path)))
    splits = prepare(config, load_rows(config.data), tokenizer)
    assert splits.counts["rows read"] == len(pairs()) == 503
    return data_content(splits, TemplateConfig(), tokenizer)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))


@cache
def expected() -> dict[str, str]:
    return tokens_of(packaged("faq-en.jsonl"))


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_format_gives_one_and_the_same_set_of_token_ids(name: str) -> None:
    assert tokens_of(packaged(name)) == expected()


@pytest.mark.parametrize("name", MADE)
def test_every_other_format_and_layout_gives_it_as_well(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)

    assert tokens_of(tmp_path / name) == expected()
