"""Compiled elementwise kernels, by their twins on a CPU."""

import logging

import pytest
import torch

from lora_search.ops import fused
from lora_search.ops.compiled import compiled

CPU = torch.device("cpu")


def test_what_cannot_be_compiled_is_not_used_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no kernel")

    x = torch.ones(3)
    with caplog.at_level(logging.WARNING):
        assert compiled("gates", broken, (x,), x, torch.equal) is None
    assert "gates cannot be compiled (ValueError): training is slower" in caplog.text


@pytest.mark.slow
def test_what_gives_other_numbers_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(3)
    with caplog.at_level(logging.WARNING):
        assert compiled("gates", torch.neg, (x,), x, torch.equal) is None
    assert "compiled gates give other numbers and are not used" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gates_are_the_plain_ones_but_for_rounding(dtype: torch.dtype) -> None:
    forward, backward = fused.compiled_gate(CPU, dtype)
    grad, gate, up = (3 * torch.randn(3, 1, 200, 130, dtype=torch.float64)).unbind()
    exact = fused.gated(gate, up), *fused.gated_backward(grad, gate, up)
    low = [x.to(dtype) for x in (grad, gate, up)]
    plain = fused.gated(*low[1:]), *fused.gated_backward(*low)

    found = forward(*low[1:]), *backward(*low)

    assert (forward, backward) != (fused.gated, fused.gated_backward)
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        assert (ours.double() - true).abs().mean() <= 1.01 * (theirs.double() - true).abs().mean()
