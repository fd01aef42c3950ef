"""What rows become: pairs of text, examples in tokens, splits."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and completion; the loss is on ``input_ids[num_prompt_tokens:]``."""

    input_ids: tuple[int, ...]
    num_prompt_tokens: int


@dataclass(frozen=True)
class Splits:
    """What is trained on and what it is judged by. ``data_hash``: of the rows, whatever their order."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    max_length: int
    data_hash: str
    counts: dict[str, int]
    pairs: dict[str, tuple[Pair, ...]] = field(default_factory=dict)  # the text of each split
