import torch
from torch import nn
from torch.nn import functional as F

from lora_search import passes
from lora_search.passes import CompletionNll


def test_chunked_nll_and_its_gradient_equal_cross_entropy() -> None:
    torch.manual_seed(0)
    num_tokens = passes.HEAD_CHUNK + 37
    head = nn.Linear(8, 30).double().requires_grad_(False)
    hidden = torch.randn(num_tokens, 8, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(30, (num_tokens,)), torch.rand(num_tokens)

    (CompletionNll.apply(hidden, head, target) * weight).sum().backward()
    grad, hidden.grad = hidden.grad, None
    (F.cross_entropy(head(hidden).float(), target, reduction="none") * weight).sum().backward()

    torch.testing.assert_close(grad, hidden.grad, rtol=1e-4, atol=1e-8)  # the loss is taken in float32
