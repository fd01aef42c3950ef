"""The settings of `data`: which rows to read, how to split them, how long they may be."""

import codecs
from dataclasses import dataclass, field
from typing import Any

from lora_search.settings.rules import require, require_choice, require_range

AUTO = "auto"
PACKAGED = "construction-faq"  # data.path of the packaged pairs
FORMATS = (
    AUTO, "messages", "sharegpt", "gemini", "prompt_completion", "alpaca", "instruction_response",
    "question_answer",
)  # fmt: skip
MAX_ROWS, MAX_TOKENS = 10**9, 1_048_576  # per file; per row: no model has a longer context
VALIDATION_ROWS = 1000  # auto: more rows cost time at every rung and separate few more trials
PARTS = ("instruction", "context", "response", "messages", "system", "tools")
OPTIONAL = ("context", "system", "tools")


@dataclass(kw_only=True)
class ColumnsConfig:
    """Which column holds which part; auto recognises the usual names, null leaves an optional part out."""

    instruction: str = AUTO
    context: str | None = AUTO
    response: str = AUTO
    messages: str = AUTO  # turns of a conversation
    system: str | None = AUTO
    tools: str | None = AUTO
    weight: str | None = None  # a number for each training row: how much its tokens count in the loss
    ignore: list[str] = field(default_factory=list)  # text columns to leave out

    def __post_init__(self) -> None:
        chosen = self.chosen()
        for part, name in chosen.items():
            key = f"data.columns.{part}"
            require(name != "", key, name, "must name a column of the file")
            rule = "must differ from the columns of the other parts"
            require(list(chosen.values()).count(name) <= 1, key, name, rule)
        require(self.weight != "", "data.columns.weight", self.weight, "must name a column of the file")
        turns, rule = chosen.get("messages"), "excludes data.columns.instruction, context and response"
        others = {"instruction", "context", "response"} & chosen.keys()
        require(turns is None or not others, "data.columns.messages", turns, rule, "Give one or the other")

    def chosen(self) -> dict[str, str]:
        """Return part -> column for the parts that the user set."""
        names = {part: getattr(self, part) for part in PARTS}
        return {part: name for part, name in names.items() if name not in (AUTO, None)}


@dataclass(kw_only=True)
class DataConfig:
    path: Any = "???"  # a file, a folder, a hub data set, a URL, construction-faq, or a list of them
    validation_path: Any = None  # your own validation rows; null splits them off data.path
    test_path: Any = None
    subset: str | None = None  # the configuration of a hub data set, or the sheet of an Excel file
    split: str | None = None  # the training split of a hub or saved data set; null tries the usual names
    revision: str | None = None  # of a hub data set: a commit, branch or tag
    format: str = AUTO  # layout of a row; auto recognises it by the columns
    encoding: str = AUTO  # of text files; auto detects UTF-8 and UTF-16
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    weights: list[float] = field(default_factory=list)  # how often an epoch repeats each path's rows
    group_by: str | None = None  # a column: rows with the same value stay in the same split
    on_bad_row: str = "refuse"  # or skip: leave bad rows out and count them
    on_control_text: str = "refuse"  # text that spells a control token, e.g. <|im_end|>; keep: it becomes one
    on_leakage: str = "refuse"  # questions shared by your own splits; or remove: from the training rows
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    max_train_examples: int | str | None = AUTO  # auto or null: all; auto with the packaged pairs: see below
    max_validation_examples: int | str | None = AUTO  # auto: 1000; with the packaged pairs: see below
    demo_train_examples: int | None = None  # for the packaged pairs only
    demo_validation_examples: int | None = None
    max_length: int | str = AUTO  # tokens per row; auto: the percentile below of the training rows
    max_length_percentile: float = 99.0
    max_length_choices: list[int] = field(default_factory=list)  # auto picks the smallest that is enough

    def __post_init__(self) -> None:
        for key in ("path", "validation_path", "test_path"):
            value = getattr(self, key)
            is_list = isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)
            is_path = isinstance(value, str) and bool(value.strip())
            optional = key != "path" and value is None
            require(is_path or (is_list and bool(value)) or optional, f"data.{key}", value,
                    "must name a file or folder, or a list of them")  # fmt: skip
        require_choice("data.on_bad_row", self.on_bad_row, ("refuse", "skip"))
        require_choice("data.on_control_text", self.on_control_text, ("refuse", "keep"))
        require_choice("data.on_leakage", self.on_leakage, ("refuse", "remove"))
        require_choice("data.format", self.format, FORMATS)
        require(_is_encoding(self.encoding), "data.encoding", self.encoding, "must be a text encoding",
                "Try utf-8, cp1252 or utf-16")  # fmt: skip
        for key in ("subset", "split", "revision", "group_by"):
            text = getattr(self, key)
            require(text is None or bool(text.strip()), f"data.{key}", text, "must not be empty", "Try null")
        self._check_split()
        self._check_sizes()

    def _check_split(self) -> None:
        for key in ("validation_fraction", "test_fraction"):
            value = getattr(self, key)
            low_ok = value > 0 if key == "validation_fraction" else value >= 0
            require(low_ok and value < 1, f"data.{key}", value, "must be between 0 and 1", "Try 0.1")
        total = self.validation_fraction + self.test_fraction
        require(total < 1, "data.validation_fraction + data.test_fraction", total, "must be below 1")
        weights, key = self.weights, "data.weights"
        require(all(0 < w <= 100 for w in weights), key, weights, "must be numbers above 0, at most 100")
        rule = f"must be as many as the paths of data.path, {len(self.paths)}"
        require(len(weights) in (0, len(self.paths)), key, weights, rule, "Give one number per path")

    def _check_sizes(self) -> None:
        for key in (
            "max_train_examples", "max_validation_examples", "demo_train_examples", "demo_validation_examples"
        ):  # fmt: skip
            cap = getattr(self, key)
            fits = cap is None or (cap == AUTO and key.startswith("max")) or _at_least(cap, 1)
            require(fits, f"data.{key}", cap, "must be at least 1, or null for all")
            if isinstance(cap, int):
                require_range(f"data.{key}", cap, 1, MAX_ROWS, "null takes all rows")
        is_length = self.max_length == AUTO or _at_least(self.max_length, 8)
        require(is_length, "data.max_length", self.max_length, "must be a number of tokens >= 8, or auto")
        if isinstance(self.max_length, int):
            remedy = "auto chooses it from the rows"
            require_range("data.max_length", self.max_length, 8, MAX_TOKENS, remedy)
        percentile = self.max_length_percentile
        require(0 < percentile <= 100, "data.max_length_percentile", percentile, "must be in (0, 100]")
        choices, key = self.max_length_choices, "data.max_length_choices"
        require(
            all(c >= 8 for c in choices), key, choices, "must be numbers of tokens >= 8", "Try [512,1024]"
        )
        for choice in choices:
            require_range(key, choice, 8, MAX_TOKENS, "Try [512,1024]")
        rule = "are for data.max_length=auto only"
        require(not choices or self.max_length == AUTO, key, choices, rule, "Set data.max_length=auto")

    @property
    def paths(self) -> list[str]:
        return _as_list(self.path)

    @property
    def name(self) -> str:
        """Return data.path for display."""
        return ", ".join(self.paths)

    def own(self, split: str) -> list[str]:
        """Return the paths of the user's own validation or test split."""
        return _as_list({"validation": self.validation_path, "test": self.test_path}[split])

    def cap(self, split: str) -> int | None:
        """Return the most rows of a split to use; None for all."""
        cap, demo, usual = {
            "train": (self.max_train_examples, self.demo_train_examples, None),
            "validation": (self.max_validation_examples, self.demo_validation_examples, VALIDATION_ROWS),
            "test": (None, None, None),
        }[split]
        if cap != AUTO:
            return None if cap is None else int(cap)
        return demo if demo is not None and self.paths == [PACKAGED] else usual


def _as_list(paths: Any) -> list[str]:
    if paths is None:
        return []
    return [paths] if isinstance(paths, str) else list(paths)


def _at_least(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_encoding(name: str) -> bool:
    try:
        return name == AUTO or bool(codecs.lookup(name)._is_text_encoding)
    except (LookupError, ValueError):
        return False
