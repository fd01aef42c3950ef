"""What data becomes on its way: rows as they were read, pairs of text, examples in tokens, splits."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One question with its answer, and where it came from ("faq.jsonl:17")."""

    instruction: str
    context: str
    response: str
    source: str

    @property
    def question(self) -> str:
        return f"{self.instruction}\n\n{self.context}" if self.context else self.instruction


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

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    max_length: int
    data_hash: str
    counts: dict[str, int]
    pairs: dict[str, tuple[Pair, ...]] = field(default_factory=dict)  # the text of each split
