"""Runs the parts, or those named, one after the other, shows every figure as it comes, and prints the table.
Touches no GPU itself. Needs torch, transformers, peft, rich; TRL's rows need trl and datasets.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Timer
from typing import Any

from lora_search.output.terminal import Progress
from tests.benchmarks.gpu import BATCH_SIZES

PARTS = {  # part -> how the keys of its figures begin
    "small": ("small",),
    "large": ("matmul", "large", "undropped", "recomputed"),
    "exact": ("exact", "noise", "peft"),
    "rivals": ("trl", "plain"),
}
MOST_SECONDS = 300.0  # for one part; it is ended then, with what it had measured
FIT = "95 to 105 %"
AIMS = dict(zip(BATCH_SIZES, ("8x", "6x", "4x", "3x"), strict=True))
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}


@dataclass
class Results:
    """What the parts gave: key -> (value, remark), and why a key or a part gave nothing."""

    figures: dict[str, tuple[float, str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    about: str = "no device"

    def value(self, key: str) -> float:
        return self.figures[key][0]

    def reason(self, key: str) -> str:
        """Return why there is no such figure: what its step said, or how its part ended."""
        part = next(part for part, kinds in PARTS.items() if key.partition(".")[0] in kinds)
        return self.failures.get(key) or self.failures.get(part) or "not measured"


@dataclass(frozen=True)
class Line:
    """A row of the table: from which figures, by which formula, written how."""

    name: str
    keys: tuple[str, ...]
    formula: Callable[..., float]
    form: str
    aim: str = ""

    def cells(self, results: Results) -> tuple[str, str, str, str]:
        missing = [key for key in self.keys if key not in results.figures]
        if missing:
            return self.name, "failed", self.aim, results.reason(missing[0])
        value = self.formula(*(results.value(key) for key in self.keys))
        remark = results.figures[self.keys[0]][1] if len(self.keys) == 1 else ""
        return self.name, self.form.format(value), self.aim, remark


def same(value: float) -> float:
    return value


def ratio(a: float, b: float) -> float:
    return a / b


def outside(share: float) -> float:
    return max(0.0, 1.0 - share)


def of_matmul(rate: float, parameters: float, flops: float) -> float:
    """Return the share of the matmul rate: a token takes 4 FLOPs a weight where the base is frozen."""
    return 4.0 * rate * parameters / flops


def table() -> list[Line]:
    """Return every row, in order."""
    speed, times, share = "{:,.0f} tokens/s", "{:.2f}x", "{:.1%}"
    lines = []
    for b in BATCH_SIZES:
        packed, alone = f"small.{b}.packed", f"small.{b}.alone"
        lines += [
            Line(f"small model, batch {b}, packed", (packed,), same, speed),
            Line(f"small model, batch {b}, one trial alone", (alone,), same, speed),
            Line(f"small model, batch {b}, packed against alone", (packed, alone), ratio, times, AIMS[b]),
            Line(f"small model, batch {b}, time outside passes", (f"small.{b}.in_passes",), outside, share),
        ]
    lines.append(Line("matmul", ("matmul",), lambda flops: flops / 1e12, "{:.4g} TFLOP/s"))
    for key, name in (("large", "large model"), ("recomputed", "large model, layers computed again")):
        rates = (f"{key}.rate", "large.parameters", "matmul")
        lines += [
            Line(name, (f"{key}.rate",), same, speed),
            Line(f"{name}, tokens/s x 4 x parameters of matmul", rates, of_matmul, share, "60 %"),
            Line(f"{name}, time outside passes", (f"{key}.in_passes",), outside, share),
            Line(f"{name}, predicted memory", (f"{key}.predicted",), _gib, "{:.4f} GiB"),
            Line(f"{name}, measured memory", (f"{key}.peak",), _gib, "{:.4f} GiB"),
            Line(f"{name}, predicted to measured", (f"{key}.predicted", f"{key}.peak"), ratio, share, FIT),
        ]  # fmt: skip
    lines.append(Line("large model, without dropout", ("undropped.rate",), same, speed))
    for kind, name in (("trl", "TRL SFTTrainer + PEFT"), ("plain", "plain PEFT loop")):
        for size, ours in (("large", "large.rate"), ("small", "small.8.packed")):
            key, aim = f"{kind}.{size}", "4x" if kind == "trl" else ""
            lines += [
                Line(f"{name}, {size} model, batch 8, one trial", (key,), same, speed),
                Line(f"ours against {name}, {size} model", (ours, key), ratio, times, aim),
            ]
    for dtype in ("float32", "bfloat16"):
        lines += [
            Line(f"packed against alone, loss of a step, {dtype}", (f"exact.{dtype}",), same, "{:.1e}"),
            Line(f"alone twice, loss of a step, {dtype}", (f"noise.{dtype}",), same, "{:.1e}"),
            Line(f"perplexity in plain PEFT, {dtype}", (f"peft.{dtype}",), same, "{:.1e}"),
        ]
    return lines


def _gib(num_bytes: float) -> float:
    return num_bytes / 2**30


def measure(part: str, sizes: list[str], results: Results, show: Callable[[str], None]) -> None:
    """Run one part to its end, or to its time limit, and show every figure as it comes; it counts."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu.part", part, *sizes]
    first = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=os.environ | OFFLINE | first
        )
        late = Timer(MOST_SECONDS, process.kill)
        late.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"keys"'):
                _note(record := json.loads(line), results)
                show(_shown(part, record))
        is_late = not late.is_alive()
        late.cancel()
        end = f"its process ended with {process.wait()}"
        end = f"not done after {MOST_SECONDS:.0f} s" if is_late else end
        complaints.seek(0)
        said = complaints.read()
    last = (said.strip().splitlines() or [""])[-1]
    results.failures[part] = f"{end}: {last}" if last else end
    if any(key.partition(".")[0] in PARTS[part] for key in results.failures) or not end.endswith(" 0"):
        sys.stderr.write(said)


def _shown(part: str, record: dict[str, Any]) -> str:
    """Return a record for display: the figures, or why there are none."""
    if "figures" in record:
        return f"{part}: " + ", ".join(f"{key} {value:.6g}" for key, (value, _) in record["figures"].items())
    return f"{part}: {record.get('about') or record['failure']}"


def _note(record: dict[str, object], results: Results) -> None:
    if "about" in record:
        results.about = str(record["about"])
    elif "failure" in record:
        assert isinstance(keys := record["keys"], list)
        results.failures |= dict.fromkeys(keys, str(record["failure"]))
    else:
        assert isinstance(figures := record["figures"], dict)
        results.figures |= {key: (float(value), str(remark)) for key, (value, remark) in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all; tiny: the CPU's size")
    named = parser.parse_args().parts
    strange = [name for name in named if name not in (*PARTS, "tiny")]
    if strange:
        parser.error(f"{strange[0]}: must be one of {', '.join(PARTS)}, tiny")
    progress, results = Progress(), Results()
    for part in [part for part in PARTS if part in named] or list(PARTS):
        start = time.perf_counter()
        measure(part, [name for name in named if name == "tiny"], results, progress.event)
        progress.event(f"{part}: {time.perf_counter() - start:.0f} s")
    head = (results.about, "figure", "aim", "how")
    for row in (head, ("---",) * 4, *(line.cells(results) for line in table())):
        progress.console.print(f"| {' | '.join(row)} |", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
