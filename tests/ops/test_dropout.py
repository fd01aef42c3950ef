import pytest
import torch

from lora_search.ops.dropout import Mask, drop, kept, masked, pair_keys, threshold, token_keys


def dropped(keys: torch.Tensor, layer: int, width: int, probability: float) -> torch.Tensor:
    thresholds = torch.full_like(keys, threshold(probability), dtype=torch.int16)
    return kept(keys, thresholds, layer, width) == 0


def test_the_share_of_dropped_elements_is_the_probability() -> None:
    keys = token_keys(7, list(range(40)), [50] * 40)

    for probability in (0.05, 0.3):
        mask = dropped(keys, 3, 256, probability).float()
        assert abs(mask.mean().item() - probability) < 3e-3
        assert mask.mean(0).std() < 0.02
        assert mask.mean(1).std() < 0.05


def test_masks_of_layers_seeds_and_examples_are_uncorrelated() -> None:
    masks = [
        dropped(token_keys(seed, [ordinal], [200]), layer, 256, 0.5).float().flatten()
        for seed, ordinal, layer in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]
    ]

    correlation = torch.corrcoef(torch.stack(masks)) - torch.eye(4)

    assert correlation.abs().max() < 0.02


def test_a_mask_does_not_depend_on_who_shares_the_pass() -> None:
    together = token_keys(5, [3, 4], [11, 6])

    alone = token_keys(5, [4], [6])

    assert torch.equal(together[11:], alone)


def test_pairs_of_tokens_and_of_features_are_uncorrelated() -> None:
    keys = token_keys(3, list(range(8)), [128] * 8)
    mask = dropped(keys, 5, 512, 0.3).float()
    z = (mask - mask.mean()) / mask.std()

    for pairs, count in ((z @ z.T, 512), (z.T @ z, 1024)):
        off_diagonal = pairs[~torch.eye(len(pairs), dtype=torch.bool)] / count**0.5
        assert abs(off_diagonal.std() - 1.0) < 0.05  # what independent masks give
        assert off_diagonal.abs().max() < 6.5


def test_without_dropout_everything_stays() -> None:
    assert not dropped(token_keys(1, [0], [50]), 0, 64, 0.0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [96, 97])
def test_the_way_of_a_gpu_drops_the_same_to_the_bit(width: int, dtype: torch.dtype) -> None:
    keys = token_keys(3, [4, 9], [200, 57])
    thresholds = torch.tensor([threshold(p) for p in (0.05, 0.0)], dtype=torch.int16).repeat_interleave(
        torch.tensor([200, 57])
    )
    x = torch.randn(257, width, generator=torch.Generator().manual_seed(0)).to(dtype)

    found = drop(x, keys, thresholds, pair_keys(5, (width + 1) // 2, x.device))

    assert found.dtype is dtype
    assert torch.equal(found, masked(x, kept(keys, thresholds, 5, width)))
    assert torch.equal(found, Mask(keys, thresholds, 5).apply(x, slice(0, 257)))
    assert (found[:200] == 0).any()
    assert not (found[200:] == 0).any()
