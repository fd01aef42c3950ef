"""Tokens made piece by piece are those of the whole text, whatever the tokenizer does at the seams."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_search.data.boundaries import Tokens

TEXTS = [
    "<|im_start|>user\nWhy is the sky  blue?<|im_end|>\n<|im_start|>assistant\n\n\n  It is.\n<|im_end|>\n",
    "<|im_start|>user\nAnd  when it rains?<|im_end|>\n<|im_start|>assistant\nThen too.<|im_end|>\n",
    "[INST] no special token at the start [/INST] So.<|im_end|>",
    " <|im_end|><|im_start|> side <|im_end|>by<|im_end|>x side <|im_start|><|im_start|>",
    "åäö <|im_|im_end|>> 한국어 <think>\n\n</think>\n\n{}<|im_end|> \n \t\n",
    "",
]
REACH: dict[str, dict[str, bool]] = {
    "plain": {}, "takes blanks after it": {"rstrip": True}, "takes blanks before it": {"lstrip": True},
    "stands alone": {"single_word": True}, "normalized": {"normalized": True},
}  # fmt: skip
SHAPES = {
    "byte level": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte level, blank first": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "metaspace at the first": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace at each": (None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "prepending normalizer": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
    ),
    "lower case": (normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
}
CASES = [(shape, reach) for shape in SHAPES for reach in REACH]


def make_tokenizer(shape: str, reach: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = SHAPES[shape]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    options = {"normalized": False, "special": True, **REACH[reach]}
    tokenizer.add_tokens([AddedToken(text, **options) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "\n\n", "<|im_end|>\n")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(("shape", "reach"), CASES)
def test_tokens_of_every_text_and_every_beginning_are_the_tokenizers_own(shape: str, reach: str) -> None:
    tokenizer = make_tokenizer(shape, reach)
    bounds = [range(len(text) + 1) for text in TEXTS]
    expected = [
        tokenizer([text[:bound] for bound in ends], add_special_tokens=False)["input_ids"]
        for text, ends in zip(TEXTS, bounds, strict=True)
    ]

    made = Tokens(tokenizer).of_batch(TEXTS, bounds)

    assert [whole for whole, _ in made] == [prefixes[-1] for prefixes in expected]
    assert [[whole[: b.num_shared] + b.rest for b in begun] for whole, begun in made] == expected


@pytest.mark.parametrize("reach", ["plain", "takes blanks before it"])
def test_only_a_token_that_keeps_to_itself_cuts_a_text(reach: str) -> None:
    tokens = Tokens(make_tokenizer("byte level", reach))
    text = TEXTS[0]

    ((_, (beginning,)),) = tokens.of_batch([text], [[text.index("assistant\n") + 10]])

    assert (beginning.num_shared > 0) == (reach == "plain")


def test_truncation_and_padding_that_a_tokenizer_file_asks_for_cut_and_add_nothing() -> None:
    tokenizer = make_tokenizer("byte level", "plain")
    expected = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=300)

    assert Tokens(tokenizer).of(TEXTS) == expected
