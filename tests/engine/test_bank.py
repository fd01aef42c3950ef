"""The adapters of a pass against plain autograd, slot by slot."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_search.engine.bank import SlotBank, SlotLinear
from lora_search.engine.optim import SlotAdamW
from lora_search.ops.dropout import kept, threshold, token_keys
from lora_search.ops.lora import Plan
from tests.conftest import SETTINGS, make_run
from tests.harness import build_engine, random_splits

D_IN, D_OUT = 12, 10


def make_bank(tmp_path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, SlotBank]:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).to(dtype).requires_grad_(False)
    bank = SlotBank(model, {"0": model[0]}, 3, 8, dtype)
    for slot, dropout in ((0, 0.0), (2, 0.4)):
        settings = make_run(tmp_path, slot, r=4 + slot, dropout=dropout).settings
        bank.admit(slot, settings, ("0",), seed=slot)
        for _, _, b_RO in bank.rows[slot].layout.pairs(bank.rows[slot].theta):
            b_RO.normal_()
        bank.refresh(slot)
    return model, bank


@pytest.mark.parametrize("shape", [(9, D_IN), (1, 9, D_IN)])
def test_adapters_and_gradients_equal_plain_autograd(tmp_path, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    model, bank = make_bank(tmp_path)
    x = torch.randn(shape, requires_grad=True)
    keys, thresholds = token_keys(5, [0], [9]), [threshold(0.0)] * 6 + [threshold(0.4)] * 3
    threshold_T = torch.tensor(thresholds, dtype=torch.int16)
    bank.set_plan(Plan((0, None, 2), (0, 4, 6, 9), keys, threshold_T), lambda x: x)
    keep = kept(keys, threshold_T, 0, D_IN) != 0
    leaves, pieces = (
        {},
        list(F.linear(x.reshape(9, D_IN), model[0].base.weight, model[0].base.bias).split([4, 2, 3])),
    )
    for piece, slot, rows in ((0, 0, slice(0, 4)), (2, 2, slice(6, 9))):
        adapter = bank.adapters[0][slot]
        a, b = leaves[slot] = [t.detach().clone().requires_grad_() for t in (adapter.a_RD, adapter.b_RO)]
        scale = adapter.scaling / (1.0 - adapter.dropout)
        pieces[piece] = pieces[piece] + ((x.reshape(9, D_IN)[rows] * keep[rows]) @ a.T) @ b * scale
    expected = torch.cat(pieces).view(*shape[:-1], D_OUT)
    weight = torch.randn_like(expected)
    flat = [leaf for pair in leaves.values() for leaf in pair]
    expected_x, *expected_leaves = torch.autograd.grad((expected * weight).sum(), [x, *flat])

    output = model(x)
    (output * weight).sum().backward()

    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, expected_x)
    grads = [
        grad
        for slot in (0, 2)
        for grad in (bank.adapters[0][slot].grad_a_RD, bank.adapters[0][slot].grad_b_RO)
    ]
    torch.testing.assert_close(grads, expected_leaves)


def test_the_matmuls_see_theta_in_the_dtype_of_the_base(tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, bank = make_bank(tmp_path, torch.bfloat16)

    (theta_P,), (used_P,) = bank.rows[0].theta, bank.rows[0].used
    theta_P.add_(0.125)
    bank.refresh(0)

    assert theta_P.dtype == torch.float32
    assert torch.equal(used_P, theta_P.bfloat16())


def test_released_slots_leave_nothing_behind(tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, bank = make_bank(tmp_path)

    bank.release(2)

    assert list(bank.rows) == list(bank.adapters[0]) == [0]
    assert not bank.layers[0].table_S5[2].any()
    assert SETTINGS.r == 4


def test_the_product_of_a_gated_mlp_is_computed_again_and_not_kept(tiny_llama: Path, tmp_path: Path) -> None:
    engine = build_engine(tiny_llama, random_splits())
    engine.admit([make_run(tmp_path, target_modules=("down_proj",), dropout=0.1)])
    engine.model.bank.set_plan(
        Plan((0,), (0, 9), token_keys(1, [0], [9]), torch.full((9,), threshold(0.1)).short()), lambda x: x
    )
    down = engine.model.decoder.layers[0].mlp.down_proj
    gate, up = torch.randn(2, 1, 9, down.in_features).unbind()
    found = []
    for run in (down.gated, lambda gate, up: down(F.silu(gate) * up)):
        leaves, kept = [x.clone().requires_grad_() for x in (gate, up)], []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.data_ptr()) or x, lambda x: x
        ):
            y = run(*leaves)
        y.square().sum().backward()
        (grad_P,) = engine.bank.rows[0].grad
        found.append(([y, *(x.grad for x in leaves), grad_P.clone()], len(set(kept))))
        grad_P.zero_()

    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][0][3].any()
    assert found[0][1] == 3  # gate, up and the hidden states of the adapters


def test_a_gated_mlp_is_fused_with_adapters_on_its_layers(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, random_splits())

    layers = engine.model.decoder.layers

    assert all(isinstance(layer.mlp.gate_proj, SlotLinear) for layer in layers)
    assert all("forward" in vars(layer.mlp) for layer in layers)


def test_the_memory_of_a_slot_counts_moments_copy_and_start() -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).to(torch.bfloat16).requires_grad_(False)
    bank = SlotBank(model, {"0": model[0]}, 1, 8, torch.bfloat16)
    optimizer, settings = SlotAdamW(bank.rows), replace(SETTINGS, r=5, init="pissa")
    bank.admit(0, settings, ("0",), seed=0)
    optimizer.reset(0)
    row, moments = bank.rows[0], optimizer.moments[0]
    kinds = (row.theta, row.grad, row.used, row.start, moments.exp_avg, moments.exp_avg_sq)

    assert bank.bytes_of(settings, ("0",)) == sum(part.nbytes for parts in kinds for part in parts)
    assert sum(row.layout.sizes) == 5 * (D_IN + D_OUT)
