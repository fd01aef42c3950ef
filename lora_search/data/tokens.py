"""Tokenizes text: the exact boundary of the prompt, the length of rows, cutting and leaving out."""

import hashlib
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, chain

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_search.data.boundaries import Beginning, Tokens
from lora_search.data.conversation_masks import ConversationRenderer
from lora_search.data.rows import Example, Item, Pair
from lora_search.data.store import Numbers, StoredItems
from lora_search.data.templates import Renderer
from lora_search.errors import ConfigError, DataError, ModelError
from lora_search.reading.rows import Row
from lora_search.settings.schema import DataConfig, require

LONGEST = 100_000  # tokenizers without a limit report 10**30

SHOWN_ROWS = 3
BATCH = 1000
REFUSED = "rows that the template refuses (left out)"
LENGTH = "tokens in a training row:"  # prefix of the counts of the token distribution


def tokenize_rows(
    rows: Sequence[Row],
    renderer: Renderer,
    loss_on: str = "all_assistant_turns",
    *,
    skip: bool = False,
    is_needed: bool = True,
) -> Iterator[Item]:
    """Yield the items of rows; with ``skip``, without those that the template refuses, which it counts. A
    thread tokenizes one batch, without the interpreter's lock, while this one renders the next and uses the
    previous. Raises ConfigError for a row that the template refuses; with ``skip``, if it refuses the first
    1,000 or all, and some ``is_needed``."""
    conversations, tokens = ConversationRenderer(renderer, loss_on), Tokens(renderer.tokenizer)
    under_way: deque[tuple[Sequence[Row], list[Pair], Future[list[Example]]]] = deque()
    refused: list[ConfigError] | None = [] if skip else None
    with ThreadPoolExecutor(1) as thread:
        for start in range(0, len(rows), BATCH):
            batch, pairs = _rendered(rows[start : start + BATCH], renderer, conversations, refused)
            if refused and not pairs and not start and is_needed:
                rule, remedy = f"{refused[0].rule}, as all of {len(refused)} rows", "Choose another base."
                raise ConfigError(refused[0].key, refused[0].value, rule, remedy)
            under_way.append((batch, pairs, thread.submit(_examples, pairs, tokens)))
            if len(under_way) > 1:
                yield from _items(*under_way.popleft())
        while under_way:
            yield from _items(*under_way.popleft())
    renderer.counts[REFUSED] += len(refused or ())


def _items(rows: Sequence[Row], pairs: list[Pair], examples: Future[list[Example]]) -> Iterator[Item]:
    for row, pair, example in zip(rows, pairs, examples.result(), strict=True):
        yield Item(row.source, pair, replace(example, weight=row.loss_weight), _times(row))


def _rendered(
    rows: Sequence[Row],
    renderer: Renderer,
    conversations: ConversationRenderer,
    refused: list[ConfigError] | None,
) -> tuple[Sequence[Row], list[Pair]]:
    """Return the rows with their texts; halves find those that the template refuses, if they are wanted."""
    before = renderer.counts.copy()
    try:
        return rows, _pairs(rows, renderer, conversations)
    except ConfigError as error:
        if refused is None:
            raise
        renderer.counts.clear()
        renderer.counts.update(before)
        if len(rows) == 1:
            refused.append(error)
            return [], []
    half = len(rows) // 2
    parts = [_rendered(part, renderer, conversations, refused) for part in (rows[:half], rows[half:])]
    return [row for part, _ in parts for row in part], [pair for _, part in parts for pair in part]


def _pairs(rows: Sequence[Row], renderer: Renderer, conversations: ConversationRenderer) -> list[Pair]:
    questions = iter(renderer.pairs([row for row in rows if not row.messages]))
    return [conversations.pair(row) if row.messages else next(questions) for row in rows]


def _times(row: Row) -> int:
    """Return how often an epoch repeats a row; a hash of its text decides about the fractional part."""
    whole, rest = divmod(row.weight, 1)
    if not rest:
        return int(whole)
    place = int(hashlib.sha256(f"{row.question}\n{row.response}".encode()).hexdigest()[:8], 16) / 16**8
    return int(whole) + (place < rest)


def check_vocabulary(
    path: str, used: Numbers, tokenizer: PreTrainedTokenizerBase, num_embeddings: int
) -> None:
    """Raise ModelError if a token of the rows has no embedding."""
    largest = int(used.max())
    if largest >= num_embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"model.path: {path} has embeddings for {num_embeddings} tokens, and its tokenizer gives "
            f"{token!r} the id {largest} (from 0). Give model and tokenizer that belong together, or save "
            "the model after resize_token_embeddings."
        )


def _examples(pairs: Sequence[Pair], tokens: Tokens) -> list[Example]:
    batch = tokens.of_batch([pair.prompt + pair.completion for pair in pairs], list(map(_bounds, pairs)))
    return [_example(pair, *row, tokens) for pair, row in zip(pairs, batch, strict=True)]


def _bounds(pair: Pair) -> list[int]:
    """Return the boundaries between roles, in characters: after the prompt, and around masked spans."""
    start = len(pair.prompt)
    return [start, *(start + bound for part in pair.masked for bound in part)]


def _example(pair: Pair, whole: list[int], beginnings: Sequence[Beginning], tokens: Tokens) -> Example:
    """Keep the boundaries exact: at inference the model continues from the prompt's own tokens.

    The whole text mostly begins with them. Where it does not (a token would straddle a boundary), the parts
    are joined. Always joining them would teach SentencePiece models a blank too many before each answer.
    """
    ends = [len(beginning) for beginning in beginnings]
    if not all(beginning.begins(whole) for beginning in beginnings):
        parts = [whole[: beginnings[0].num_shared] + beginnings[0].rest, *tokens.of(pair.parts)]
        whole, ends = list(chain.from_iterable(parts)), list(accumulate(map(len, parts)))
    return Example(tuple(whole), ends[0], tuple(zip(ends[1::2], ends[2::2], strict=False)))


def choose_max_length(config: DataConfig, lengths: Numbers, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the maximum tokens of a row; ``lengths`` are those of the training rows."""
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
    """Return the token distribution of the training rows in three figures, before cutting."""
    median, most = np.percentile(lengths, (50, 99))
    return {
        f"{LENGTH} median": round(float(median)),
        f"{LENGTH} 99 % up to": math.ceil(float(most)),
        f"{LENGTH} longest": int(lengths.max()),
    }


def fitting_rows(
    items: Mapping[str, StoredItems], max_length: int, config: DataConfig, counts: Counter[str]
) -> dict[str, Numbers]:
    """Return the numbers of the rows to use, as often as an epoch repeats them. Rows whose prompt alone fills
    the length are left out and counted, or refused if the user chose the length."""
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
    """Count the rows that `cut` shortens."""
    long = numbers[items.lengths[numbers] > max_length]
    counts[f"{name} truncated"] = len(long)
    at_turns = sum(bool(_borders(items.example(int(i)), max_length)) for i in long)
    counts[f"{name} truncated at the end of a turn"] = at_turns


def _borders(example: Example, max_length: int) -> list[int]:
    """Return the ends of learnt turns within the length that are followed by others."""
    return [start for start, _ in example.masked if start <= max_length]


def cut(example: Example, max_length: int) -> Example:
    """Return the part of a row that fits: up to the end of a turn, or else to the last token."""
    if len(example.input_ids) <= max_length:
        return example
    borders = _borders(example, max_length)
    length = borders[-1] if borders else max_length
    return replace(
        example, input_ids=example.input_ids[:length], masked=example.masked[: max(len(borders) - 1, 0)]
    )


def cut_pair(item: Item, max_length: int, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Return the text of the part that `cut` keeps."""
    pair, short = item.pair, cut(item.example, max_length)
    if short is item.example:
        return pair
    if borders := _borders(item.example, max_length):
        number = len(borders) - 1
        return Pair(pair.prompt, pair.completion[: pair.masked[number][0]], pair.masked[:number])
    return Pair(pair.prompt, tokenizer.decode(list(short.input_ids[short.num_prompt_tokens :])))
