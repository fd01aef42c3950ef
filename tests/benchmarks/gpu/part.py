"""One part of the measurements in a process of its own: prints a line of JSON for what each step gives.

Arguments: the part; `tiny` for the CPU's size.
"""

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch
import transformers

from lora_search.failures import first_line
from tests.benchmarks.gpu import BATCH_SIZES
from tests.benchmarks.gpu.exact import exactness
from tests.benchmarks.gpu.packed import (
    Figures,
    large_fitted,
    large_without_dropout,
    matmul,
    small_alone,
    small_packed,
)
from tests.benchmarks.gpu.rivals import rival
from tests.benchmarks.gpu.shapes import Scale, gpu, random_base, tiny
from tests.benchmarks.gpu.speed import release_memory

Step = Callable[[], Figures]


def steps(part: str, scale: Scale) -> list[tuple[tuple[str, ...], Step]]:
    """Return what a part measures, in order, with the keys of its figures; one may fail, the others go on."""
    if part == "small":
        base = random_base(scale.small, scale)
        return [
            step
            for b in BATCH_SIZES
            for step in (
                ((f"small.{b}.packed", f"small.{b}.in_passes"), partial(small_packed, base, scale, b)),
                ((f"small.{b}.alone",), partial(small_alone, base, scale, b)),
            )
        ]
    if part == "large":
        base = random_base(scale.large, scale)
        fitted = ("rate", "in_passes", "predicted", "peak")
        plain, recomputed = (tuple(f"{n}.{figure}" for figure in fitted) for n in ("large", "recomputed"))
        return [
            (("matmul", "large.parameters"), partial(matmul, base, scale)),
            (plain, partial(large_fitted, base, scale, False)),
            (("undropped.rate",), partial(large_without_dropout, base, scale)),
            (recomputed, partial(large_fitted, base, scale, True)),  # last: layers stay so
        ]
    if part == "exact":
        return [
            (tuple(f"{kind}.{name}" for kind in ("exact", "noise", "peft")), partial(exactness, scale, dtype))
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        ]
    cases = [(kind, name) for name in ("large", "small") for kind in ("trl", "plain")]
    return [((f"{kind}.{name}",), partial(rival, scale, kind, name)) for kind, name in cases]


def tell(record: dict[str, object]) -> None:
    print(json.dumps(record), flush=True)  # noqa: T201 (its result)


def run(keys: tuple[str, ...], step: Step, scale: Scale) -> None:
    release_memory(scale.device)
    try:
        figures = step()
    except Exception as error:  # noqa: BLE001  (whatever it was, the other steps are still to be measured)
        traceback.print_exc()
        tell({"keys": keys, "failure": f"{type(error).__name__}: {first_line(error)}"})
    else:
        tell({"keys": keys, "figures": figures})


def main() -> None:
    transformers.logging.set_verbosity_error()
    part, scale = sys.argv[1], tiny() if "tiny" in sys.argv[2:] else gpu()
    is_gpu = scale.device.type == "cuda"
    card = torch.cuda.get_device_name(scale.device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    tell({"keys": [], "about": f"{card}; torch {torch.__version__}, {scale.dtype}"})
    for keys, step in steps(part, scale):
        run(keys, step, scale)


if __name__ == "__main__":
    main()
