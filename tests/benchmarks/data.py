"""Rows of one's own at scale: `python -m tests.benchmarks.data [ROWS]` (default 100,000 of about 100 tokens).

Each line is a process of its own: reading, cleaning, splitting, rendering and tokenizing on the first start;
the second start; and `datasets.map` with the same tokenizer and template, which renders and tokenizes only.
All use the same cores; CPU seconds are what compares on a machine that does other things as well.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = (
    "permit",
    "house",
    "roof",
    "wall",
    "owner",
    "city",
    "plan",
    "build",
    "law",
    "when",
    "who",
    "must",
    "may",
)


def write_rows(path: Path, num_rows: int) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            question, answer = (" ".join(draw.choices(WORDS, k=k)) for k in (15, 65))
            file.write(json.dumps({"question": f"{number} {question}?", "answer": f"{answer}."}) + "\n")


def measure(part: str, path: str) -> None:
    """Print what one part takes, beyond the imports and the tokenizer."""
    import datasets
    import pyarrow.compute

    from lora_search.data.preparation import prepare
    from lora_search.data.store import knows_rows, lengths_of
    from lora_search.model.loading import load_tokenizer, resolve_model
    from lora_search.reading.load import load_rows
    from lora_search.settings.schema import DataConfig, ModelConfig, SweepConfig

    config = SweepConfig(model=ModelConfig(), data=DataConfig(path=path))
    tokenizer = load_tokenizer(resolve_model(config.model), config.model)
    tokenizer(["warm"] * 2)  # the threads of the tokenizer
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    cpu = time.process_time()
    if part == "datasets.map":
        datasets.disable_progress_bars()

        def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": q}, {"role": "assistant", "content": a}], tokenize=False
                )
                for q, a in zip(batch["question"], batch["answer"], strict=True)
            ]
            ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            return {"input_ids": ids}

        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.Dataset.from_json(path, cache_dir=cache)
            made = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
            tokens = pyarrow.compute.sum(pyarrow.compute.list_value_length(made.data["input_ids"])).as_py()
    else:
        splits = prepare(config, load_rows(config.data, is_known=knows_rows), tokenizer)
        tokens = sum(int(lengths_of(part).sum()) for part in (splits.train, splits.validation, splits.test))
        for index in range(0, len(splits.train), 97):
            assert len(splits.train[index].input_ids) > 8
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(  # noqa: T201
        f"{part:<14}{seconds:8.1f} s {cpu:8.1f} s of CPU   +{more:.2f} GiB   {tokens:,} tokens kept",
        flush=True,
    )


def main() -> None:
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", num_rows)
        print(f"{num_rows:,} rows", flush=True)  # noqa: T201
        _share_models(Path(folder))
        for part in ("first start", "second start", "datasets.map"):
            environment = {**os.environ, "LORA_SEARCH_CACHE": folder}
            command = [sys.executable, "-m", "tests.benchmarks.data", "--part", part, f"{folder}/rows.jsonl"]
            subprocess.run(command, check=True, env=environment)


def _share_models(folder: Path) -> None:
    """Let the throwaway cache find the converted base that is there already."""
    usual = Path("~/.cache/lora_search").expanduser()
    for model in usual.glob("*") if usual.is_dir() else ():
        if model.name != "data" and not (folder / model.name).exists():
            (folder / model.name).symlink_to(model)


if __name__ == "__main__":
    measure(*sys.argv[2:]) if sys.argv[1:2] == ["--part"] else main()
