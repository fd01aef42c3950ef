"""The settings of `data`: what is read, how it is split, how long a row may be."""

from dataclasses import dataclass, field

from lora_search.settings.rules import require, require_choice


@dataclass(kw_only=True)
class ColumnsConfig:
    """Which column of the file holds which part. `context` may be absent from the file."""

    instruction: str = "instruction"
    context: str | None = "context"
    response: str = "response"

    def __post_init__(self) -> None:
        names = [name for name in (self.instruction, self.context, self.response) if name is not None]
        for key in ("instruction", "context", "response"):
            name = getattr(self, key)
            require(name != "", f"data.columns.{key}", name, "must name a column of the file")
            rule = "must be another column than the other parts"
            require(names.count(name) <= 1, f"data.columns.{key}", name, rule)


@dataclass(kw_only=True)
class DataConfig:
    path: str = "???"  # a file or folder of one's own, or construction-faq, the packaged pairs
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    on_bad_row: str = "refuse"  # or skip: leave bad rows out and count them
    on_control_text: str = "refuse"  # text that spells a control token, as <|im_end|>; keep: it becomes one
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    max_train_examples: int | None = None
    max_validation_examples: int | None = None
    max_length: int | str = "auto"  # tokens per row, or auto: the percentile below of the training rows
    max_length_percentile: float = 99.0
    max_length_choices: list[int] = field(default_factory=list)  # auto takes the smallest that is enough

    def __post_init__(self) -> None:
        require(bool(self.path.strip()), "data.path", self.path, "must name a file or folder")
        require_choice("data.on_bad_row", self.on_bad_row, ("refuse", "skip"))
        require_choice("data.on_control_text", self.on_control_text, ("refuse", "keep"))
        for key in ("validation_fraction", "test_fraction"):
            value = getattr(self, key)
            low_ok = value > 0 if key == "validation_fraction" else value >= 0
            require(low_ok and value < 1, f"data.{key}", value, "must lie between 0 and 1", "Try 0.1")
        total = self.validation_fraction + self.test_fraction
        require(total < 1, "data.validation_fraction + data.test_fraction", total, "must be below 1")
        for key in ("max_train_examples", "max_validation_examples"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"data.{key}", value, "must be at least 1, or null for all")
        is_length = self.max_length == "auto" or (isinstance(self.max_length, int) and self.max_length >= 8)
        require(is_length, "data.max_length", self.max_length, "must be a number of tokens >= 8, or auto")
        percentile = self.max_length_percentile
        require(0 < percentile <= 100, "data.max_length_percentile", percentile, "must lie in (0, 100]")
        choices, key = self.max_length_choices, "data.max_length_choices"
        require(
            all(c >= 8 for c in choices), key, choices, "must be numbers of tokens >= 8", "Try [512,1024]"
        )
        rule = "are for data.max_length=auto only"
        require(not choices or self.max_length == "auto", key, choices, rule, "Set data.max_length=auto")
