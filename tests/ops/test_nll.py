import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_search.ops.nll import CPU_ROWS, Head


@pytest.mark.parametrize(
    ("softcap", "bias", "scale"),
    [(None, False, 1.0), (None, True, 1.0), (1.5, False, 1.0), (None, True, 0.125), (1.5, False, 3.0)],
)
def test_chunked_nll_and_its_gradient_equal_cross_entropy(
    softcap: float | None, bias: bool, scale: float
) -> None:
    torch.manual_seed(0)
    num_tokens = CPU_ROWS[0] + 37
    output = nn.Linear(8, 30, bias=bias).double().requires_grad_(False)
    hidden = torch.randn(num_tokens, 8, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(30, (num_tokens,)), torch.rand(num_tokens)
    scaled = output(hidden) * scale
    logits = scaled if softcap is None else torch.tanh(scaled / softcap) * softcap
    expected = F.cross_entropy(logits, target, reduction="none")
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), hidden)

    nll = Head(output, softcap, scale).nll(hidden, target)

    (nll * weight).sum().backward()
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(hidden.grad, expected_grad)
    with torch.no_grad():
        torch.testing.assert_close(Head(output, softcap, scale).nll(hidden, target), expected)
