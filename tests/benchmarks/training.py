"""`make bench`: our engine against TRL + PEFT, SmolLM2-135M on FAQ rows, useful tokens only; prints a table.

Every figure comes from a process of its own, both sides in turn in one run, medians of three. TRL is taken in
its best setting (`rival`). The sweep is run for real on our side; on TRL's it is its measured speed times the
same tokens, without what loading and setting up would cost it. Takes about 15 minutes on 2 cores.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lora_search.assembly import Room, build_engine
from lora_search.composition import compose
from lora_search.config import StudyConfig, SweepConfig
from lora_search.data import prepare
from lora_search.engine import Engine
from lora_search.model import load_base, load_tokenizer, pick_dtype, resolve_model
from lora_search.progress import Progress
from lora_search.reading import load_rows
from lora_search.space import parse_space
from lora_search.study import SweepStudy
from lora_search.tracking import make_tracker
from lora_search.trial import Measurement
from lora_search.worker import work

ROUNDS = 3
TOKENS_PER_PASS = "1024"
Figures = dict[str, float]


def run(module: str, *arguments: str) -> Figures:
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def median(runs: list[Figures], key: str) -> float:
    return statistics.median(figures[key] for figures in runs)


def matmul_gflops(dtype: torch.dtype) -> float:
    """Return the best rate of the shape that dominates: 512 tokens through an MLP matrix."""
    x, weight = torch.randn(512, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * 512 * 576 * 1536 / min(seconds) / 1e9


class TimedEngine(Engine):
    """Knows how long its passes, steps and evaluations took, without checkpoints and exports."""

    busy_seconds = 0.0

    def advance(self) -> list[Measurement]:
        start, before = time.perf_counter(), self.busy_seconds
        measurements = super().advance()
        self.busy_seconds = before + time.perf_counter() - start - (before - self.busy_seconds)
        return measurements

    def _save(self, *arguments: object) -> None:
        self._outside(super()._save, arguments)

    def _record_rung(self, *arguments: object) -> None:
        self._outside(super()._record_rung, arguments)

    def _outside(self, part: object, arguments: tuple[object, ...]) -> None:
        start = time.perf_counter()
        part(*arguments)  # type: ignore[operator]
        self.busy_seconds -= time.perf_counter() - start


def sweep(pruner: str, folder: Path) -> Figures:
    """Run the default sweep in this process; return seconds in all, seconds busy, and tokens."""
    name = f"bench-{pruner}"
    config = compose("construction_faq", [f"pruner={pruner}", f"study.name={name}"])
    config.study = StudyConfig(
        name=name, n_trials=config.study.n_trials, storage=f"sqlite:///{folder}/bench.db"
    )
    space, source = parse_space(config), resolve_model(config.model)
    splits = prepare(config, load_rows(config.data), load_tokenizer(source, config.model), folder / "data")
    base = load_base(source, config.model, config.engine)
    engine, _ = build_engine(config, Room.of_space(config, space), base, splits)
    engine.__class__ = TimedEngine
    start = time.perf_counter()
    study = SweepStudy.open(config, space, {"bench": pruner}, {}, folder / name)
    with Progress() as progress:
        work(study, engine, make_tracker(config, {}), progress)
    seconds = time.perf_counter() - start
    assert isinstance(engine, TimedEngine)
    return {"seconds": seconds, "busy": engine.busy_seconds, **_tokens_of_all(config, splits)}


def _tokens_of_all(config: SweepConfig, splits: object) -> Figures:
    """Return the tokens that all trials take without pruning."""
    train, validation = (
        sum(len(r.input_ids) for r in getattr(splits, name)) for name in ("train", "validation")
    )
    rungs = config.train.epochs * config.train.evals_per_epoch
    trials = config.study.n_trials
    return {
        "train_tokens": trials * config.train.epochs * train,
        "validation_tokens": trials * rungs * validation,
    }


def main() -> None:
    progress = Progress()
    dtype = pick_dtype("auto", torch.device("cpu"))
    ours = str(dtype).removeprefix("torch.")
    settings = [(d, b) for d in ("float32", "bfloat16") for b in ("2", "4", "8")]
    rivals = {setting: run("rival", *setting) for setting in settings}
    best = max(rivals, key=lambda setting: rivals[setting]["train"])
    progress.event(f"TRL's best here: {best[0]}, {best[1]} rows per forward")
    columns: dict[str, list[Figures]] = {"trl": [], "1": [], "4": [], "8": []}
    for _ in range(ROUNDS):
        columns["trl"].append(run("rival", *best))
        for slots in ("1", "4", "8"):
            columns[slots].append(run("ours", ours, slots, TOKENS_PER_PASS))
    trl_train = median(columns["trl"], "train")
    trl_validation = max(median(columns["trl"], "validation"), *(r["validation"] for r in rivals.values()))
    with tempfile.TemporaryDirectory() as folder:
        plain, pruned = sweep("none", Path(folder)), sweep("asha", Path(folder))
    trl_sweep = plain["train_tokens"] / trl_train + plain["validation_tokens"] / trl_validation
    rate, flops = matmul_gflops(dtype), 4 * columns["1"][0]["parameters"] / 1e9
    one, four, eight = (median(columns[slots], "train") for slots in ("1", "4", "8"))
    validation = median(columns["4"], "validation")
    memory = median(columns["8"], "peak_bytes") / median(columns["1"], "peak_bytes")
    overhead = 1 - (plain["busy"] + pruned["busy"]) / (plain["seconds"] + pruned["seconds"])
    rows = [
        ("training, one trial alone", f"{one:.0f} tokens/s", f"{trl_train:.0f}", f"{one / trl_train:.1f}x"),
        ("training, 4 packed", f"{four:.0f} tokens/s", f"{trl_train:.0f}", f"{four / trl_train:.1f}x"),
        ("training, 8 packed", f"{eight:.0f} tokens/s", f"{trl_train:.0f}", f"{eight / trl_train:.1f}x"),
        (
            "validation",
            f"{validation:.0f} tokens/s",
            f"{trl_validation:.0f}",
            f"{validation / trl_validation:.1f}x",
        ),
        (
            "default sweep, no pruning",
            f"{plain['seconds']:.0f} s",
            f"{trl_sweep:.0f}",
            f"{trl_sweep / plain['seconds']:.1f}x",
        ),
        (
            "default sweep, pruned",
            f"{pruned['seconds']:.0f} s",
            f"{trl_sweep:.0f}",
            f"{trl_sweep / pruned['seconds']:.1f}x",
        ),
        (
            f"share of the {ours} matmul rate, 8 packed",
            f"{eight * flops:.0f} GFLOP/s",
            f"{rate:.0f}",
            f"{eight * flops / rate:.0%}",
        ),
        ("outside passes, steps and evaluation", "", "", f"{overhead:.1%}"),
        ("peak memory, 8 slots against 1", "", "", f"{memory:.2f}x"),
    ]
    progress.console.print(f"| {ours}, {torch.get_num_threads()} cores | lora_search | TRL + PEFT | ratio |")
    progress.console.print("|---|---|---|---|")
    for row in rows:
        progress.console.print(f"| {' | '.join(row)} |", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
