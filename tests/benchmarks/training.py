"""`python -m tests.benchmarks.training [ROUNDS]`: our engine against TRL + PEFT, SmolLM2-135M on FAQ rows.

Useful tokens only. Every figure comes from a process of its own, both sides in turn in one run, medians of
three rounds. TRL is taken in its best setting of six (float32 or bfloat16; 2, 4 or 8 rows per forward,
grouped by length) and as typed (8 rows per forward, float32). The sweep runs for real on our side; on TRL's
it is its measured speed times the same tokens, without loading and setting up. About 20 minutes on 2 cores.
"""

import json
import statistics
import subprocess
import sys
import time

import torch

from lora_search.ops.device import pick_dtype
from lora_search.output.terminal import Progress

ROUNDS, TOKENS_PER_PASS = 3, "1024"
SETTINGS = [(dtype, rows) for dtype in ("float32", "bfloat16") for rows in ("2", "4", "8")]
AS_TYPED = ("float32", "8")
Figures = dict[str, float]


def run(module: str, *arguments: str) -> Figures:
    """Return what one measurement prints last."""
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def median(runs: list[Figures], key: str) -> float:
    return statistics.median(figures[key] for figures in runs)


def matmul_gflops(dtype: torch.dtype) -> float:
    """Return the best rate of the shape that dominates: 1,024 tokens through an MLP matrix."""
    x, weight = torch.randn(1024, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * 1024 * 576 * 1536 / min(seconds) / 1e9


def speed_rows(trl: list[Figures], typed: Figures, ours: dict[str, list[Figures]]) -> list[tuple[str, ...]]:
    """Return the rows of the table that compare tokens per second."""
    best, slow = median(trl, "train"), typed["train"]
    names = {"1": "one trial alone", "4": "4 packed", "8": "8 packed"}
    rows = [
        _row(f"training, {names[slots]}", median(runs, "train"), best, slow) for slots, runs in ours.items()
    ]
    validation = max(median(runs, "validation") for runs in ours.values())
    return [*rows, _row("validation", validation, median(trl, "validation"), typed["validation"])]


def sweep_rows(trl: list[Figures], typed: Figures, plain: Figures, pruned: Figures) -> list[tuple[str, ...]]:
    """Return the rows that compare whole sweeps, in seconds."""
    sides = ({key: median(trl, key) for key in ("train", "validation")}, typed)
    theirs = [
        plain["full_train_tokens"] / side["train"] + plain["full_validation_tokens"] / side["validation"]
        for side in sides
    ]
    return [
        (name, f"{ours['seconds']:.0f} s", *(f"{t:.0f} s ({t / ours['seconds']:.1f}x)" for t in theirs))
        for name, ours in (("default sweep, no pruning", plain), ("default sweep, pruned", pruned))
    ]


def _row(name: str, ours: float, best: float, typed: float) -> tuple[str, ...]:
    theirs = (f"{figure:.0f} tokens/s ({ours / figure:.1f}x)" for figure in (best, typed))
    return (name, f"{ours:.0f} tokens/s", *theirs)


def main() -> None:
    progress = Progress()
    dtype = pick_dtype("auto", torch.device("cpu"))
    name = str(dtype).removeprefix("torch.")
    rivals = {}
    for setting in SETTINGS:
        rivals[setting] = run("rival", *setting)
        progress.event(
            f"TRL, {setting[0]}, {setting[1]} rows per forward: {rivals[setting]['train']:.0f} tokens/s"
        )
    best = max(rivals, key=lambda setting: rivals[setting]["train"])
    trl: list[Figures] = []
    ours: dict[str, list[Figures]] = {"1": [], "4": [], "8": []}
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
        trl.append(run("rival", *best))
        for slots, runs in ours.items():
            runs.append(run("ours", name, slots, TOKENS_PER_PASS))
        progress.event("a round is over")
    other = run("ours", "float32" if name == "bfloat16" else "bfloat16", "1", TOKENS_PER_PASS)
    plain, pruned = run("whole", "none"), run("whole", "asha")
    table = speed_rows(trl, rivals[AS_TYPED], ours) + sweep_rows(trl, rivals[AS_TYPED], plain, pruned)
    head = (
        f"{name}, {torch.get_num_threads()} cores",
        "lora_search",
        f"TRL's best ({', '.join(best)})",
        "TRL as typed",
    )
    for row in (head, ("---",) * 4, *table):
        progress.console.print(f"| {' | '.join(row)} |", markup=False, soft_wrap=True)
    eight, one = (median(ours[slots], "train") for slots in ("8", "1"))
    flops, rate = 4 * ours["1"][0]["parameters"] / 1e9, matmul_gflops(dtype)
    overhead = 1 - (plain["busy"] + pruned["busy"]) / (plain["seconds"] + pruned["seconds"])
    memory = median(ours["8"], "peak_bytes") / median(ours["1"], "peak_bytes")
    lines = [
        f"tokens/s x 4 x parameters: {eight * flops:.0f} GFLOP/s packed, {one * flops:.0f} alone, of a "
        f"{name} matmul rate of {rate:.0f} ({eight * flops / rate:.0%}, {one * flops / rate:.0%})",
        f"outside passes, steps and evaluation: {overhead:.1%} of the two sweeps",
        f"peak memory, 8 slots against 1: {memory:.2f}x ({median(ours['8'], 'peak_bytes') / 2**30:.2f} GiB)",
        f"pruned: {pruned['pruned']:.0f} trials; best {pruned['best']:.3f}, unpruned {plain['best']:.3f}",
        f"perplexity after one epoch in {name}: {median(ours['1'], 'perplexity'):.3f}, in the other dtype: "
        f"{other['perplexity']:.3f}; of the base {ours['1'][0]['base_perplexity']:.3f}, "
        f"{other['base_perplexity']:.3f}",
    ]
    for line in lines:
        progress.console.print(f"- {line}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
