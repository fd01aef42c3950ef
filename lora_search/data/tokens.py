"""From text to token ids: the exact boundary of the prompt, the length of rows, what is cut and left out."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_search.data.masks import ConversationRenderer
from lora_search.data.rows import Example, Item, Pair
from lora_search.data.store import Numbers, StoredItems
from lora_search.data.templates import Renderer
from lora_search.errors import DataError, ModelError
from lora_search.reading.rows import Row
from lora_search.settings.schema import DataConfig, require

LONGEST = 100_000  # tokenizers without a limit report 10**30

SHOWN_ROWS = 3
BATCH = 1000
LENGTH = "tokens in a training row:"  # so begin the counts of the token distribution


def tokenize_rows(
    rows: Sequence[Row], renderer: Renderer, loss_on: str = "all_assistant_turns"
) -> Iterator[Item]:
    """Yield the items of rows, tokenized a batch at a time."""
    conversations = ConversationRenderer(renderer, loss_on)
    for start in range(0, len(rows), BATCH):
        yield from _tokenize_batch(rows[start : start + BATCH], renderer, conversations)


def _tokenize_batch(
    rows: Sequence[Row], renderer: Renderer, conversations: ConversationRenderer
) -> Iterator[Item]:
    tokenizer = renderer.tokenizer
    pairs = [conversations.pair(row) if row.messages else renderer.pair(row) for row in rows]
    prompts = _tokenize([pair.prompt for pair in pairs], tokenizer)
    wholes = _tokenize([pair.prompt + pair.completion for pair in pairs], tokenizer)
    for row, pair, prompt, whole in zip(rows, pairs, prompts, wholes, strict=True):
        yield Item(row.source, pair, _example(pair, prompt, whole, tokenizer), _times(row))


def _times(row: Row) -> int:
    """Return how often an epoch shows a row; what is left over after the whole times falls by its text."""
    whole, rest = divmod(row.weight, 1)
    place = int(hashlib.sha256(f"{row.question}\n{row.response}".encode()).hexdigest()[:8], 16) / 16**8
    return int(whole) + (place < rest)


def check_vocabulary(
    path: str, examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, num_embeddings: int
) -> None:
    """Raise ModelError where a token of the rows has no embedding."""
    largest = max(max(example.input_ids) for example in examples)
    if largest >= num_embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"model.path: {path} has embeddings for {num_embeddings} tokens, and its tokenizer gives "
            f"{token!r} the id {largest} (from 0). Give model and tokenizer that belong together, or save "
            "the model after resize_token_embeddings."
        )


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


def choose_max_length(config: DataConfig, lengths: Numbers, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most tokens of a row; ``lengths`` are those of the training rows."""
    limit = min(int(tokenizer.model_max_length), LONGEST)
    if isinstance(config.max_length, int):
        rule = f"must be at most {limit}, the longest input of the model"
        require(config.max_length <= limit, "data.max_length", config.max_length, rule)
        return config.max_length
    enough = math.ceil(float(np.percentile(lengths, config.max_length_percentile)) / 8) * 8
    if not config.max_length_choices:
        return min(enough, limit)
    choices = sorted(config.max_length_choices)
    chosen = next((choice for choice in choices if choice >= enough), choices[-1])
    rule = f"must be at most {limit}, the longest input of the model"
    require(chosen <= limit, "data.max_length_choices", chosen, rule)
    return chosen


def describe_lengths(lengths: Numbers) -> dict[str, int]:
    """Return the token distribution of the training rows in three figures, before anything is cut."""
    median, most = np.percentile(lengths, (50, 99))
    return {
        f"{LENGTH} median": round(float(median)),
        f"{LENGTH} 99 % up to": math.ceil(float(most)),
        f"{LENGTH} longest": int(lengths.max()),
    }


def fitting_rows(
    items: Mapping[str, StoredItems], max_length: int, config: DataConfig, counts: Counter[str]
) -> dict[str, Numbers]:
    """Return the numbers of the rows that are used, as often as an epoch shows them. Rows whose prompt alone
    fills the length are left out and counted; refused if the user chose the length."""
    fitting = {name: np.flatnonzero(part.num_prompts < max_length) for name, part in items.items()}
    too_long = {name: np.flatnonzero(part.num_prompts >= max_length) for name, part in items.items()}
    num_too_long = sum(map(len, too_long.values()))
    nothing_left = not len(fitting["train"]) or not len(fitting["validation"])
    if nothing_left or (num_too_long and config.on_bad_row == "refuse" and config.max_length != "auto"):
        first = [items[name].item(int(i)) for name, part in too_long.items() for i in part[:SHOWN_ROWS]]
        shown = [f"{i.source}: {i.example.num_prompt_tokens} tokens before the answer" for i in first]
        most = max(int(items[name].num_prompts[part].max()) for name, part in too_long.items() if len(part))
        skip = "" if nothing_left else ", or leave such rows out with data.on_bad_row=skip"
        raise DataError(
            f"data.max_length: {num_too_long} rows have no room for an answer in {max_length} tokens:\n  "
            + "\n  ".join(shown[:SHOWN_ROWS])
            + f"\nRaise data.max_length above {most}{skip}."
        )
    for name in items:
        counts[f"{name} left out: prompt fills max_length"] = len(too_long[name])
    return {name: np.repeat(numbers, items[name].times[numbers]) for name, numbers in fitting.items()}


def count_cuts(
    name: str, items: StoredItems, numbers: Numbers, max_length: int, counts: Counter[str]
) -> None:
    """Count the rows that `cut` makes shorter."""
    long = numbers[items.lengths[numbers] > max_length]
    counts[f"{name} truncated"] = len(long)
    at_turns = sum(bool(_borders(items.example(int(i)), max_length)) for i in long)
    counts[f"{name} truncated at the end of a turn"] = at_turns


def _borders(example: Example, max_length: int) -> list[int]:
    """Return where learnt turns end that are within the length and others follow."""
    return [start for start, _ in example.masked if start <= max_length]


def cut(example: Example, max_length: int) -> Example:
    """Return what of a row fits: up to the end of a turn, or else to the last token."""
    if len(example.input_ids) <= max_length:
        return example
    borders = _borders(example, max_length)
    length = borders[-1] if borders else max_length
    return replace(
        example, input_ids=example.input_ids[:length], masked=example.masked[: max(len(borders) - 1, 0)]
    )


def cut_pair(item: Item, max_length: int, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Return the text of what `cut` leaves."""
    pair, short = item.pair, cut(item.example, max_length)
    if short is item.example:
        return pair
    if borders := _borders(item.example, max_length):
        number = len(borders) - 1
        return Pair(pair.prompt, pair.completion[: pair.masked[number][0]], pair.masked[:number])
    return Pair(pair.prompt, tokenizer.decode(list(short.input_ids[short.num_prompt_tokens :])))
