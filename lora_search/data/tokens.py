"""From text to token ids: the exact boundary of the prompt, the length of rows, what is cut and left out."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_search.data.masks import ConversationRenderer
from lora_search.data.rows import Example, Pair
from lora_search.data.templates import Renderer
from lora_search.errors import DataError
from lora_search.reading.rows import Row
from lora_search.settings.schema import DataConfig, require

LONGEST = 100_000  # tokenizers without a limit report 10**30

SHOWN_ROWS = 3
LENGTH = "tokens in a training row:"  # so begin the counts of the token distribution


@dataclass(frozen=True)
class Item:
    """One row on its way: its text and its tokens."""

    source: str
    pair: Pair
    example: Example


def tokenize_rows(
    rows: Sequence[Row], renderer: Renderer, loss_on: str = "all_assistant_turns"
) -> list[Item]:
    tokenizer, conversations = renderer.tokenizer, ConversationRenderer(renderer, loss_on)
    pairs = [conversations.pair(row) if row.messages else renderer.pair(row) for row in rows]
    prompts = _tokenize([pair.prompt for pair in pairs], tokenizer)
    wholes = _tokenize([pair.prompt + pair.completion for pair in pairs], tokenizer)
    return [
        Item(row.source, pair, _example(pair, prompt, whole, tokenizer))
        for row, pair, prompt, whole in zip(rows, pairs, prompts, wholes, strict=True)
    ]


def _example(pair: Pair, prompt: list[int], whole: list[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Keep the boundary exact: a model that answers gets the prompt's own tokens and goes on from there.

    The whole text mostly begins with them. Where it does not (a token would straddle the boundary), the parts
    are joined. Always joining them would teach SentencePiece models a blank too many before each answer.
    """
    if pair.masked:
        return _masked_example(pair, whole, tokenizer)
    if whole[: len(prompt)] == prompt:
        return Example(tuple(whole), len(prompt))
    (completion,) = _tokenize([pair.completion], tokenizer)
    return Example((*prompt, *completion), len(prompt))


def _masked_example(pair: Pair, whole: list[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return the tokens of a conversation, with the bounds between who speaks on whole tokens."""
    text, start = pair.prompt + pair.completion, len(pair.prompt)
    bounds = [start, *(start + bound for part in pair.masked for bound in part)]
    pieces = [text[a:b] for a, b in zip([0, *bounds], [*bounds, len(text)], strict=True)]
    ids = _tokenize(pieces, tokenizer)
    if [token for piece in ids for token in piece] != whole:
        ids = _pieces_by_prefix(text, bounds, whole, tokenizer) or ids
    ends = list(accumulate(len(piece) for piece in ids))
    masked = zip(ends[1:-1:2], ends[2:-1:2], strict=True)
    return Example(tuple(token for piece in ids for token in piece), ends[0], tuple(masked))


def _pieces_by_prefix(
    text: str, bounds: Sequence[int], whole: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]] | None:
    """Return the whole cut at each bound; None where a token straddles one."""
    begun = _tokenize([text[:bound] for bound in bounds], tokenizer)
    if any(whole[: len(ids)] != ids for ids in begun):
        return None
    ends = [0, *map(len, begun), len(whole)]
    return [whole[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of each text. The template wrote the special tokens already."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def choose_max_length(
    config: DataConfig, train: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> int:
    limit = min(int(tokenizer.model_max_length), LONGEST)
    if isinstance(config.max_length, int):
        rule = f"must be at most {limit}, the longest input of the model"
        require(config.max_length <= limit, "data.max_length", config.max_length, rule)
        return config.max_length
    lengths = [len(example.input_ids) for example in train]
    enough = math.ceil(float(np.percentile(lengths, config.max_length_percentile)) / 8) * 8
    if not config.max_length_choices:
        return min(enough, limit)
    choices = sorted(config.max_length_choices)
    chosen = next((choice for choice in choices if choice >= enough), choices[-1])
    rule = f"must be at most {limit}, the longest input of the model"
    require(chosen <= limit, "data.max_length_choices", chosen, rule)
    return chosen


def describe_lengths(train: Sequence[Item]) -> dict[str, int]:
    """Return the token distribution in three figures, before anything is cut."""
    lengths = [len(item.example.input_ids) for item in train]
    median, most = np.percentile(lengths, (50, 99))
    return {
        f"{LENGTH} median": round(float(median)),
        f"{LENGTH} 99 % up to": math.ceil(float(most)),
        f"{LENGTH} longest": max(lengths),
    }


def leave_out_long_prompts(
    items: dict[str, list[Item]], max_length: int, config: DataConfig, counts: Counter[str]
) -> dict[str, list[Item]]:
    """Leave out, and count, rows whose prompt alone fills the length; refuse if the user chose the length."""
    fitting = {n: [i for i in part if i.example.num_prompt_tokens < max_length] for n, part in items.items()}
    too_long = [i for part in items.values() for i in part if i.example.num_prompt_tokens >= max_length]
    nothing_left = not fitting["train"] or not fitting["validation"]
    if nothing_left or (too_long and config.on_bad_row == "refuse" and config.max_length != "auto"):
        shown = [f"{i.source}: {i.example.num_prompt_tokens} tokens before the answer" for i in too_long]
        most = max(i.example.num_prompt_tokens for i in too_long)
        skip = "" if nothing_left else ", or leave such rows out with data.on_bad_row=skip"
        raise DataError(
            f"data.max_length: {len(too_long)} rows have no room for an answer in {max_length} tokens:\n  "
            + "\n  ".join(shown[:SHOWN_ROWS])
            + f"\nRaise data.max_length above {most}{skip}."
        )
    for name, part in items.items():
        counts[f"{name} left out: prompt fills max_length"] = len(part) - len(fitting[name])
    return fitting


def truncate(
    name: str,
    items: Sequence[Item],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
) -> list[Item]:
    """Cut rows at the end, in tokens and in text."""
    long = [item for item in items if len(item.example.input_ids) > max_length]
    counts[f"{name} truncated"] = len(long)
    counts[f"{name} truncated at the end of a turn"] = sum(bool(_borders(item, max_length)) for item in long)
    return [_cut(item, max_length, tokenizer) for item in items]


def _borders(item: Item, max_length: int) -> list[int]:
    """Return where learnt turns end that are within the length and others follow."""
    return [start for start, _ in item.example.masked if start <= max_length]


def _cut(item: Item, max_length: int, tokenizer: PreTrainedTokenizerBase) -> Item:
    example = item.example
    if len(example.input_ids) <= max_length:
        return item
    if borders := _borders(item, max_length):
        number = len(borders) - 1
        kept = replace(example, input_ids=example.input_ids[: borders[-1]], masked=example.masked[:number])
        text = item.pair.completion[: item.pair.masked[number][0]]
        return Item(item.source, Pair(item.pair.prompt, text, item.pair.masked[:number]), kept)
    short = replace(example, input_ids=example.input_ids[:max_length], masked=())
    completion = tokenizer.decode(list(short.input_ids[short.num_prompt_tokens :]))
    return Item(item.source, Pair(item.pair.prompt, completion), short)
