"""DoRA's layer against PEFT's own, with dropout: the same mask, the same numbers and gradients."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_search.engine.bank import SlotBank
from lora_search.ops.dropout import kept, threshold, token_keys
from lora_search.ops.lora import Plan
from tests.conftest import SETTINGS

D_IN, D_OUT, T = 12, 10, 9


class FixedDropout(nn.Module):
    """PEFT's dropout with a mask that is given."""

    def __init__(self, keep_TD: torch.Tensor, probability: float) -> None:
        super().__init__()
        self.keep_TD, self.probability = keep_TD, probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.keep_TD / (1.0 - self.probability)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients_are_those_of_peft(has_bias: bool, dropout: float) -> None:
    torch.manual_seed(0)
    own, peft_base = (nn.Sequential(nn.Linear(D_IN, D_OUT, bias=has_bias)) for _ in range(2))
    peft_base.load_state_dict(own.state_dict())
    settings = replace(SETTINGS, r=4, dropout=dropout, use_dora=True)
    bank = SlotBank(own.requires_grad_(False), {"0": own[0]}, 2, 8)
    bank.admit(1, settings, ("0",), seed=3)
    row = bank.rows[1]
    state = {name: torch.randn_like(tensor) for name, tensor in row.layout.tensors(row.theta).items()}
    row.layout.load(row.theta, state)
    bank.refresh(1)
    keys, thresholds = token_keys(5, [0], [T]), torch.full((T,), threshold(dropout), dtype=torch.int16)
    bank.set_plan(Plan((None, 1), (0, 3, T), keys, thresholds), lambda x: x)

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True, lora_dropout=dropout)
    plain = get_peft_model(peft_base, config)
    layer = plain.base_model.model[0]
    leaves = [
        layer.lora_A.default.weight,
        layer.lora_B.default.weight,
        layer.lora_magnitude_vector.default.weight,
    ]
    for leaf, tensor in zip(leaves, state.values(), strict=True):
        leaf.data.copy_(tensor)
    if dropout:
        keep = kept(keys, thresholds, 0, D_IN) != 0
        layer.lora_dropout["default"] = FixedDropout(keep[3:], dropout)
    x, weight_TO = torch.randn(1, T, D_IN, requires_grad=True), torch.randn(1, T, D_OUT)
    with plain.disable_adapter():
        first = plain(x[:, :3])
    expected = torch.cat([first, plain(x[:, 3:])], dim=1)
    expected_x, *expected_leaves = torch.autograd.grad((expected * weight_TO).sum(), [x, *leaves])

    output = own(x)
    (output * weight_TO).sum().backward()

    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, expected_x)
    torch.testing.assert_close([*row.layout.tensors(row.grad).values()], expected_leaves)
