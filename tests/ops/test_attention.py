"""The packed attention against transformers' own, row by row: outputs and gradients."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_search.data.rows import Example
from lora_search.engine.packed_model import SlotRows, attention_arguments, lay_end_to_end
from lora_search.ops.attention import NAME

LENGTHS = (9, 1, 14, 5)
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


def model_with(architecture: str, attention: str, **settings: object) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **{**TINY, **settings})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 64, (length,), generator=generator) for length in LENGTHS]


def packed_logits(model: PreTrainedModel) -> torch.Tensor:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    ids = torch.cat(rows())[None]
    return model(
        input_ids=ids, position_ids=positions[None], cu_seq_lens_q=bounds, max_length_q=max(LENGTHS),
        use_cache=False,
    ).logits[0]  # fmt: skip


def gradients(model: PreTrainedModel, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


GPT_OSS = {
    "num_local_experts": 4,
    "initializer_range": 0.1,
}  # at 0.3 gradients reach 252 and cancel
CASES = {
    "llama": ("llama", {}),
    "mistral, sliding": ("mistral", {"sliding_window": 4}),
    "gemma2, softcap": ("gemma2", {"attn_logit_softcapping": 0.5, "sliding_window": 100}),
    "gemma2, softcap and sliding": ("gemma2", {"attn_logit_softcapping": 0.5, "sliding_window": 4}),
    "gpt_oss, sinks": ("gpt_oss", {**GPT_OSS, "sliding_window": 100}),
    "gpt_oss, sinks and sliding": ("gpt_oss", {**GPT_OSS, "sliding_window": 4}),
    "gemma2, no softcap": ("gemma2", {"attn_logit_softcapping": None, "sliding_window": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_equal_eager_attention_row_by_row(case: str) -> None:
    architecture, settings = CASES[case]
    packed_model, eager = (model_with(architecture, name, **settings) for name in (NAME, "eager"))

    packed = packed_logits(packed_model)
    alone = torch.cat([eager(row[None], use_cache=False).logits[0] for row in rows()])

    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(packed_model, packed), gradients(eager, alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_rows_that_share_their_first_tokens_equal_eager_attention_row_by_row(case: str) -> None:
    architecture, settings = CASES[case]
    packed_model, eager = (model_with(architecture, name, **settings) for name in (NAME, "eager"))
    whole = [torch.cat([torch.arange(7, 13), row]) for row in rows()]
    pack = SlotRows(None, [Example(tuple(row.tolist()), 7) for row in whole], num_shared=6)
    segments = lay_end_to_end([pack])
    positions = torch.cat([torch.arange(s.num_before, s.num_keys) for s in segments])

    shared = packed_model(
        input_ids=torch.cat([torch.tensor(s.token_ids) for s in segments])[None],
        position_ids=positions[None],
        use_cache=False,
        **attention_arguments(segments),
    ).logits[0]

    alone = [eager(row[None], use_cache=False).logits[0] for row in whole]
    torch.testing.assert_close(shared[:6], alone[0][:6], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared[6:], torch.cat([row[6:] for row in alone]), rtol=1e-5, atol=1e-5)


def test_a_softcap_of_a_half_changes_the_numbers() -> None:
    settings = {"attn_logit_softcapping": 0.5, "sliding_window": 4}
    capped = packed_logits(model_with("gemma2", NAME, **settings))
    plain = packed_logits(model_with("gemma2", NAME, **{**settings, "attn_logit_softcapping": None}))

    assert (capped - plain).abs().max() > 0.05
