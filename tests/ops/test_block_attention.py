import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from lora_search.ops.block_attention import RowAttention

LENGTHS = (5, 1, 9, 8)
BEFORE = (0, 4, 4, 3)  # keys of each row before its first query
KEY_LENGTHS = tuple(map(sum, zip(LENGTHS, BEFORE, strict=True)))


def heads(number: int, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    packed = torch.randn(1, sum(lengths), number, 8, dtype=torch.float64, generator=generator)
    return packed.transpose(1, 2).requires_grad_()


@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 4), (6, 2), (3, 1)])
def test_each_row_is_attended_to_as_torch_does_alone(num_heads: int, num_groups: int) -> None:
    q, k, v = heads(num_heads), heads(num_groups), heads(num_groups)
    rows = zip(q.split(LENGTHS, 2), k.split(LENGTHS, 2), v.split(LENGTHS, 2), strict=True)
    alone = [F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True, scale=0.3) for row in rows]
    expected = torch.cat(alone, 2).transpose(1, 2)

    output = RowAttention.apply(q, k, v, LENGTHS, LENGTHS, 0.3)

    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 4), (6, 2), (4, 2)])
def test_queries_are_the_last_tokens_of_a_row_with_more_keys(num_heads: int, num_groups: int) -> None:
    q, k, v = heads(num_heads), heads(num_groups, KEY_LENGTHS), heads(num_groups, KEY_LENGTHS)
    rows = zip(q.split(LENGTHS, 2), k.split(KEY_LENGTHS, 2), v.split(KEY_LENGTHS, 2), BEFORE, strict=True)
    alone = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(before),
            enable_gqa=True, scale=0.3,
        )
        for q, k, v, before in rows
    ]  # fmt: skip
    expected = torch.cat(alone, 2).transpose(1, 2)

    output = RowAttention.apply(q, k, v, LENGTHS, KEY_LENGTHS, 0.3)

    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("key_lengths", [LENGTHS, KEY_LENGTHS])
def test_its_gradient_is_the_numerical_one(key_lengths: tuple[int, ...]) -> None:
    assert gradcheck(
        lambda q, k, v: RowAttention.apply(q, k, v, LENGTHS, key_lengths, 0.4),
        (heads(2), heads(1, key_lengths), heads(1, key_lengths)),
    )
