"""Which products a device computes adapters with, after a check against the plain ones."""

import logging

import torch

from lora_search.ops.dropout import Mask, mix, threshold
from lora_search.ops.lora import PLAIN, TILE, A, Layer, Plan, Products, SlotAdapter

TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}
SLOTS, BOUNDS, RANKS, WIDTH = (0, None, 2), (0, 70, 75, 140), {0: 5, 2: 40}, 72
logger = logging.getLogger(__name__)


def products_for(device: torch.device, dtype: torch.dtype) -> Products:
    """Return Triton's kernels on CUDA, if they compile and give the plain numbers; else loops over slots."""
    if device.type != "cuda":
        return PLAIN
    try:
        from lora_search.ops.lora_kernels import KERNELS  # PyTorch brings Triton for CUDA only

        with torch.cuda.device(device):  # where Triton launches
            if agree(KERNELS, device, dtype):
                return KERNELS
        logger.warning("the kernels of adapters give other numbers and are not used: training is slower")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever a compiler raises, the loop works)
        logger.warning("no kernels for adapters (%s): training is slower", type(error).__name__)
    return PLAIN


def tiles(rows: dict[int | None, int], plan: Plan, size: int | None) -> torch.Tensor:
    """Return (row of a layer's table, first token, end) of each slot's tokens, int32, in pieces of a size."""
    spans = zip(plan.slots, plan.bounds, plan.bounds[1:], strict=False)
    pieces = [
        (rows[slot], first, end if size is None else min(first + size, end))
        for slot, start, end in spans
        for first in range(start, end, size or max(1, end - start))
    ]
    return torch.tensor(pieces, dtype=torch.int32)


def agree(products: Products, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether they give the plain numbers, but for rounding, with and without dropout."""
    tolerance = TOLERANCES[dtype]
    return all(
        (found - wanted).abs().max() <= tolerance * wanted.abs().max()
        for drops in (False, True)
        for found, wanted in zip(*(results(p, drops, device, dtype) for p in (products, PLAIN)), strict=True)
    )


def results(products: Products, drops: bool, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the products of a small layer with two adapters, and a part of the bare base between."""
    layer, plan, generator = _layer(device, dtype), _plan(drops, device), torch.Generator().manual_seed(1)
    mask = (
        Mask(plan.key_T, plan.threshold_T, 1)
        if plan.key_T is not None and plan.threshold_T is not None
        else None
    )
    x_TW = torch.randn(BOUNDS[-1], WIDTH, generator=generator).to(device, dtype)
    hidden_TR = products.narrow(layer, A, x_TW, plan, mask)
    hidden_TR[:70, 5:], hidden_TR[70:75] = 0.0, 0.0  # undefined
    y_TW = products.widen(layer, A, hidden_TR, WIDTH, plan, mask)
    products.collect(layer, A, hidden_TR, x_TW, plan, mask)
    return [hidden_TR, y_TW, *(adapter.grad_a_RD for adapter in layer.adapters.values())]


def _layer(device: torch.device, dtype: torch.dtype) -> Layer:
    generator = torch.Generator().manual_seed(0)
    adapters: dict[int | None, SlotAdapter] = {}
    table_S5, scales_S2 = torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4, 2)
    for slot, r in RANKS.items():
        a_RD = torch.randn(r, WIDTH, generator=generator).div_(WIDTH**0.5).to(device, dtype)
        grad_RD = torch.zeros(r, WIDTH, device=device)
        adapters[slot] = SlotAdapter(a_RD, a_RD, grad_RD, grad_RD, 1.0 + slot, 0.1 * slot)
        table_S5[slot], scales_S2[slot] = (
            torch.tensor(x) for x in (adapters[slot].places, adapters[slot].scales)
        )
    layer = Layer(1, table_S5.to(device), scales_S2.to(device), adapters)
    layer.tabulate()
    return layer


def _plan(drops: bool, device: torch.device) -> Plan:
    plan, rows = Plan(SLOTS, BOUNDS, None, None), {0: 0, 2: 2, None: 3}
    parts_P3, tiles_N3 = (tiles(rows, plan, size).to(device) for size in (None, TILE))
    if not drops:
        return Plan(SLOTS, BOUNDS, None, None, parts_P3, tiles_N3)
    key_T = mix(torch.arange(BOUNDS[-1], dtype=torch.int32)).to(device)
    threshold_T = torch.tensor(
        [threshold(0.0)] * 75 + [threshold(0.2)] * 65, dtype=torch.int16, device=device
    )
    return Plan(SLOTS, BOUNDS, key_T, threshold_T, parts_P3, tiles_N3)
