"""PiSSA's and OLoRA's layer against PEFT's own, with dropout: the same mask, numbers and gradients."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_search.engine.bank import SlotBank
from lora_search.ops.dropout import kept, threshold, token_keys
from lora_search.ops.lora import Plan
from tests.conftest import SETTINGS
from tests.ops.test_dora import D_IN, D_OUT, FixedDropout, T


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_outputs_and_gradients_are_those_of_peft(init: str, dropout: float) -> None:
    torch.manual_seed(0)
    own, peft_base = (nn.Sequential(nn.Linear(D_IN, D_OUT)) for _ in range(2))
    peft_base.load_state_dict(own.state_dict())
    settings = replace(SETTINGS, r=4, dropout=dropout, init=init)
    bank = SlotBank(own.requires_grad_(False), {"0": own[0]}, 2, 8)
    bank.admit(1, settings, ("0",), seed=3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init, lora_dropout=dropout)
    layer = get_peft_model(peft_base, config).base_model.model[0]
    a_RD, b_OR = layer.lora_A.default.weight, layer.lora_B.default.weight
    names = "0.lora_A.weight", "0.lora_B.weight"
    row = bank.rows[1]
    torch.testing.assert_close(row.layout.tensors(row.theta), dict(zip(names, (a_RD, b_OR), strict=True)))
    moved = [torch.randn_like(tensor) for tensor in (a_RD, b_OR)]
    row.layout.load(row.theta, dict(zip(names, moved, strict=True)))
    a_RD.data.copy_(moved[0])
    b_OR.data.copy_(moved[1])
    keys, thresholds = token_keys(5, [0], [T]), torch.full((T,), threshold(dropout), dtype=torch.int16)
    bank.plans = [Plan((None, 1), (0, 3, T), keys, thresholds)]
    if dropout:
        layer.lora_dropout["default"] = FixedDropout(kept(keys, thresholds, 0, D_IN)[3:] != 0, dropout)
    x, weight_TO = torch.randn(1, T, D_IN, requires_grad=True), torch.randn(1, T, D_OUT)
    bare = nn.functional.linear(x[:, :3], own[0].base.weight, own[0].base.bias)
    expected = torch.cat([bare, layer(x[:, 3:])], dim=1)
    expected_x, *expected_leaves = torch.autograd.grad((expected * weight_TO).sum(), [x, a_RD, b_OR])

    output = own(x)
    (output * weight_TO).sum().backward()

    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, expected_x)
    torch.testing.assert_close([*row.layout.tensors(row.grad).values()], expected_leaves)
