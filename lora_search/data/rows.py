"""Rendered and tokenized rows: pairs of text, examples in tokens, splits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion to learn; ``masked`` spans of the completion, in characters, belong to
    other roles and have no loss."""

    prompt: str
    completion: str
    masked: tuple[tuple[int, int], ...] = ()

    @property
    def parts(self) -> list[str]:
        """The completion, cut where it passes from one role to another: every other part is learnt."""
        bounds = [0, *chain.from_iterable(self.masked), len(self.completion)]
        return [self.completion[a:b] for a, b in pairwise(bounds)]


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and completion; the loss is on ``input_ids[num_prompt_tokens:]``, except ``masked``
    spans, which belong to other roles. ``weight``: how much its tokens count in the training loss."""

    input_ids: tuple[int, ...]
    num_prompt_tokens: int
    masked: tuple[tuple[int, int], ...] = ()
    weight: float = 1.0

    @property
    def learnt(self) -> tuple[tuple[int, int], ...]:
        """Return the spans with loss."""
        bounds = [self.num_prompt_tokens, *chain.from_iterable(self.masked), len(self.input_ids)]
        return tuple(zip(bounds[::2], bounds[1::2], strict=True))


@dataclass(frozen=True)
class Item:
    """One row: its text, its tokens, and how often an epoch repeats it."""

    source: str
    pair: Pair
    example: Example
    times: int = 1


@dataclass(frozen=True)
class Splits:
    """The three splits. ``data_hash``: of the rows in any order."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    max_length: int
    data_hash: str
    counts: dict[str, int]
    pairs: Mapping[str, Sequence[Pair]] = field(default_factory=dict)  # the text of each split

    @property
    def parts(self) -> tuple[Sequence[Example], ...]:
        return self.train, self.validation, self.test
