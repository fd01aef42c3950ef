"""Tokenizes many texts and their beginnings, each distinct piece once.

Tokenizers split a text at its added tokens, such as <|im_end|>, and treat the pieces independently. So do we:
a piece that many rows share, like a system prompt, is tokenized once per batch, and a beginning costs only
the piece after its last added token.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Beginning:
    """The tokens of a text up to some character: the first ``num_shared`` of the whole text, and the rest."""

    num_shared: int
    rest: list[int]

    def begins(self, whole: list[int]) -> bool:
        """Return whether the whole text's tokens begin with these."""
        return whole[self.num_shared : len(self)] == self.rest

    def __len__(self) -> int:
        return self.num_shared + len(self.rest)


class Tokens:
    """Tokenizes texts that already contain the special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._is_plain = _is_plain(tokenizer)
        self._cut = re.compile("|".join(map(re.escape, _cutting(tokenizer))) or "(?!)")

    def of(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the tokens of each text."""
        if not (listed := list(texts)):
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        if not self._is_plain:
            ids: list[list[int]] = self._tokenizer(listed, **options)["input_ids"]
            return ids
        self._tokenizer(
            "", **options
        )  # switches off the truncation and padding that a tokenizer file may ask
        encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(listed, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def of_batch(
        self, texts: Sequence[str], bounds: Sequence[Sequence[int]]
    ) -> list[tuple[list[int], list[Beginning]]]:
        """Return the tokens of each text, and those before each of its bounds, given in characters."""
        cuts = [[(0, 0), *(match.span() for match in self._cut.finditer(text))] for text in texts]
        pieces = [_pieces(*row) for row in zip(texts, cuts, strict=True)]
        shared = [_shared(*row) for row in zip(cuts, bounds, strict=True)]
        rests = [
            [text[cuts[i][k][0] : bound] for k, bound in zip(shared[i], bounds[i], strict=True)]
            for i, text in enumerate(texts)
        ]
        different = dict.fromkeys(chain.from_iterable([*pieces, *rests]))
        known = dict(zip(different, self.of(different), strict=True))
        return [_joined(*row, known) for row in zip(pieces, shared, rests, strict=True)]


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the library only passes texts on to its Rust backend, which costs a quarter less when
    called without it: no masks, no offsets."""
    passes_on = getattr(type(tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus
    return passes_on and type(tokenizer).__call__ is PreTrainedTokenizerBase.__call__


def _cutting(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the added tokens, longest first; none if one of them absorbs adjacent white space or words."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if not token.normalized]
    reach = any(token.lstrip or token.rstrip or token.single_word for token in added)
    if reach or not tokenizer.is_fast:
        return []
    return sorted((str(token) for token in added if str(token)), key=len, reverse=True)


def _pieces(text: str, cuts: Sequence[tuple[int, int]]) -> list[str]:
    """Return the text cut before each added token."""
    starts = [start for start, _ in cuts]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def _shared(cuts: Sequence[tuple[int, int]], bounds: Sequence[int]) -> list[int]:
    """Return the number of whole pieces before the last added token that ends within each bound."""
    ends = [end for _, end in cuts]
    return [bisect_right(ends, bound) - 1 for bound in bounds]


def _joined(
    pieces: Sequence[str], shared: Sequence[int], rests: Sequence[str], known: dict[str, list[int]]
) -> tuple[list[int], list[Beginning]]:
    parts = [known[piece] for piece in pieces]
    starts = [0, *accumulate(map(len, parts))]
    beginnings = [Beginning(starts[k], known[rest]) for k, rest in zip(shared, rests, strict=True)]
    return list(chain.from_iterable(parts)), beginnings
