"""Compiled elementwise kernels, by their twins on a CPU."""

import logging

import pytest
import torch

from lora_search.ops import fused
from lora_search.ops.compiled import compiled
from lora_search.ops.nll import Head, compiled_nll, nll_and_gradient

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
    torch.manual_seed(0)
    fast = fused.compiled_gate(CPU, dtype)
    grad, gate, up = (3 * torch.randn(3, 1, 200, 130, dtype=torch.float64)).unbind()
    low = [x.to(dtype) for x in (grad, gate, up)]

    def results(functions: fused.Gate, *x: torch.Tensor) -> list[torch.Tensor]:
        return [functions.forward(*x[1:]), *functions.backward(*x), *functions.backward_again(*x)]

    exact, plain, found = (
        results(fused.PLAIN_GATE, grad, gate, up),
        results(fused.PLAIN_GATE, *low),
        results(fast, *low),
    )

    assert not set(fast) & set(fused.PLAIN_GATE)
    assert len(found) == 6
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        assert (ours.double() - true).abs().mean() <= 1.01 * (theirs.double() - true).abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rotations_are_the_plain_ones_but_for_rounding(dtype: torch.dtype) -> None:
    x = torch.randn(1, 5, 70, 16).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # as after a view
    cos, sin = torch.randn(2, 1, 1, 70, 16).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2

    functions = fused.compiled_rotary(CPU, dtype)

    assert functions != (fused.rotated, fused.rotated_backward)
    for fast, plain in zip(functions, (fused.rotated, fused.rotated_backward), strict=True):
        torch.testing.assert_close(fast(x, cos, sin), plain(x, cos, sin), rtol=tolerance, atol=tolerance)


def test_nll_and_its_gradient_are_those_of_torch() -> None:
    logits = (3 * torch.randn(20, 50, dtype=torch.float32)).requires_grad_()
    target = torch.randint(50, (20,))
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    expected.sum().backward()

    nll, gradient = nll_and_gradient(logits.detach(), target)

    torch.testing.assert_close(nll, expected.detach())
    torch.testing.assert_close(gradient, logits.grad)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_with_compiled_kernels_gives_the_plain_numbers(dtype: torch.dtype) -> None:
    output = torch.nn.Linear(16, 130).to(dtype).requires_grad_(False)
    hidden = torch.randn(300, 16).to(dtype).requires_grad_()
    target = torch.randint(130, (300,))
    plain, fast = Head(output), Head(output)
    fast.fast = compiled_nll(CPU, dtype)
    assert fast.fast is not None

    results = []
    for head in (plain, fast):
        hidden.grad = None
        nll = head.nll(hidden, target)
        nll.sum().backward()
        results.append((nll.detach(), hidden.grad))

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
