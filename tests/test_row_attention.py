import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from lora_search.row_attention import RowAttention

LENGTHS = (5, 1, 9, 8)


def heads(number: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    packed = torch.randn(
        1, sum(LENGTHS), number, 8, dtype=dtype, generator=torch.Generator().manual_seed(number)
    )
    return packed.transpose(1, 2).requires_grad_()


@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 4), (6, 2), (3, 1)])
def test_each_row_is_attended_to_as_torch_does_alone(num_heads: int, num_groups: int) -> None:
    q, k, v = heads(num_heads), heads(num_groups), heads(num_groups)
    rows = zip(q.split(LENGTHS, 2), k.split(LENGTHS, 2), v.split(LENGTHS, 2), strict=True)
    alone = [F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True, scale=0.3) for row in rows]
    expected = torch.cat(alone, 2).transpose(1, 2)

    output = RowAttention.apply(q, k, v, LENGTHS, 0.3)

    torch.testing.assert_close(output, expected)


def test_its_gradient_is_the_numerical_one() -> None:
    assert gradcheck(
        lambda q, k, v: RowAttention.apply(q, k, v, LENGTHS, 0.4), (heads(4), heads(2), heads(2))
    )
