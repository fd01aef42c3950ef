"""`make bench`: useful training tokens per second of N trials packed, against the same trials one at a time.

Real SmolLM2-135M and FAQ rows, both ways in one run, alternating; medians and their ratio. Also the
measured matmul rate of the machine, and what share of it the packed training reaches (4 x parameters FLOP
per token over a frozen base).
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from lora_search.composition import compose
from lora_search.data import prepare
from lora_search.engine import Engine, build_engine
from lora_search.model import load_base, load_tokenizer, resolve_model
from lora_search.progress import Progress
from lora_search.reading import load_rows
from lora_search.space import parse_space, trial_settings
from lora_search.trial import TrialRun

ROUNDS, PASSES = 5, 3


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    a, b = (
        torch.ones(1024, 576, dtype=dtype, device=device),
        torch.ones(576, 1536, dtype=dtype, device=device),
    )
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        (a @ b).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * 1024 * 576 * 1536 / statistics.median(seconds)


def tokens_per_second(engine: Engine, runs: list[TrialRun]) -> float:
    """Train PASSES passes of these trials together."""
    engine.admit(runs)
    before = sum(slot.train_tokens for slot in engine.slots if slot is not None)
    start = time.perf_counter()
    for _ in range(PASSES):
        engine.advance()
    seconds = time.perf_counter() - start
    tokens = sum(slot.train_tokens for slot in engine.slots if slot is not None) - before
    engine.release([run.number for run in runs])
    return tokens / seconds


def main() -> None:
    batch_size = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    progress = Progress()
    config = compose("construction_faq", [f"train.batch_size={batch_size}", "data.max_train_examples=null"])
    source = resolve_model(config.model)
    with tempfile.TemporaryDirectory() as folder:
        rows, tokenizer = load_rows(config.data), load_tokenizer(source, config.model)
        splits = prepare(config, rows, tokenizer, Path(folder))
        base = load_base(source, config.model, config.engine)
        engine = build_engine(config, parse_space(config), base, splits)
        settings = replace(trial_settings(config, {}), batch_size=batch_size)
        runs = [
            TrialRun(number=i, seed=i, settings=settings, folder=f"{folder}/{i}")
            for i in range(config.engine.slots)
        ]
        pairs = [
            (tokens_per_second(engine, runs), tokens_per_second(engine, runs[:1])) for _ in range(ROUNDS)
        ]
    packed, solo = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    peak = matmul_flops(base.dtype, base.device)
    share = packed * 4 * sum(p.numel() for p in base.model.parameters()) / peak
    progress.event(
        f"batch {batch_size}, {base.dtype} on {base.device}: {len(runs)} packed {packed:.0f} tokens/s"
    )
    progress.event(
        f"one at a time {solo:.0f} tokens/s, ratio {ratio:.2f}x; {share:.0%} of {peak / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
