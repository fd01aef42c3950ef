"""Runs the Triton kernels in Triton's interpreter beside the plain products, in a process of its own, as the
interpreter is on from its start or not at all: `TRITON_INTERPRET=1 python -m tests.ops.interpreted FILE`. It
multiplies no bfloat16."""

import sys
import tempfile
from pathlib import Path

import torch

from lora_search.engine.packed_model import SlotRows
from lora_search.model.tiny import make_tiny_model
from lora_search.ops.lora import PLAIN
from lora_search.ops.lora_kernels import KERNELS
from lora_search.ops.products import results
from tests.conftest import make_run
from tests.harness import build_engine, random_splits

Numbers = dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]  # of the kernels, and plain ones


def of_small_layers() -> Numbers:
    cpu = torch.device("cpu")
    return {
        f"{dtype} {drops}": tuple(results(products, drops, cpu, dtype) for products in (KERNELS, PLAIN))  # type: ignore[misc]
        for dtype in (torch.float32, torch.float16)
        for drops in (False, True)
    }


def of_a_pass(folder: Path) -> Numbers:
    """Return losses and gradients of slots with other targets and ranks, and of the bare base."""
    engine = build_engine(make_tiny_model(folder / "model"), random_splits(), slots=3)
    targets = (("q_proj", "v_proj"), ("all-linear",), ("down_proj",))
    runs = [
        make_run(folder, number, r=number + 2, dropout=0.2 * number, target_modules=names)
        for number, names in enumerate(targets)
    ]
    engine.admit(runs)
    rows_of_bank = engine.bank.rows.values()
    for row in rows_of_bank:
        for _, _, b_RO in row.layout.pairs(row.theta):
            b_RO.normal_(std=0.1)
    rows, found = engine.splits.train, []
    packs = [SlotRows(None, rows[:1])]
    packs += [SlotRows(slot, rows[slot : slot + 2], slot, (0, 1), 0.2 * slot) for slot in (2, 0, 1)]
    for products in (KERNELS, PLAIN):
        engine.bank.products = products
        nll = torch.cat(engine.model.nll(packs))
        nll.sum().backward()
        found.append([nll.detach(), *(row.grad[0].clone() for row in rows_of_bank)])
        for row in rows_of_bank:
            row.grad[0].zero_()
    return {"a pass": (found[0], found[1])}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.save(of_small_layers() | of_a_pass(Path(folder)), sys.argv[1])
