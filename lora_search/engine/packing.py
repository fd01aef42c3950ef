"""Which rows share a pass. Pure: no torch, no I/O. Never splits a row; never mixes two optimizer steps of
one trial."""

from collections.abc import Iterator, Sequence

KEYS_PER_TOKEN = 4  # one layer's keys and values are a small part of what a training pass keeps


def fill_pass(pending_lengths: Sequence[Sequence[int]], tokens_per_pass: int) -> list[int]:
    """Return how many rows to take from the front of each queue, at most ``tokens_per_pass`` tokens in all.

    The queue with the fewest tokens so far is next, so every slot advances at the same pace. A single row
    longer than the budget still gets a pass of its own.
    """
    taken_rows = [0] * len(pending_lengths)
    taken_tokens = [0] * len(pending_lengths)
    open_queues = [i for i, lengths in enumerate(pending_lengths) if lengths]
    total_tokens = 0
    while open_queues:
        queue = min(open_queues, key=lambda i: (taken_tokens[i], i))
        length = pending_lengths[queue][taken_rows[queue]]
        if total_tokens and total_tokens + length > tokens_per_pass:
            open_queues.remove(queue)
            continue
        taken_rows[queue] += 1
        taken_tokens[queue] += length
        total_tokens += length
        if taken_rows[queue] == len(pending_lengths[queue]):
            open_queues.remove(queue)
    return taken_rows


def common_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens all rows begin with."""
    first, last = (
        min(rows),
        max(rows),
    )  # a prefix shared by the first and the last in sorted order is shared by all
    different = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(different, min(len(first), len(last)))


def passes_in_order(
    num_slots: int, lengths: Sequence[int], num_shared: int, tokens_per_pass: int
) -> Iterator[dict[int, list[int]]]:
    """Yield passes over all rows of all slots, as slot to row numbers: slot after slot, so that what a slot's
    rows share, the first ``num_shared`` tokens, is computed in few passes. Attention still sees each row
    whole: a pass holds at most KEYS_PER_TOKEN times as many keys as tokens."""
    taken: dict[int, list[int]] = {}
    total_tokens = total_keys = 0
    for slot in range(num_slots):
        for row, length in enumerate(lengths):
            new_tokens = length - num_shared if slot in taken else length
            is_full = total_tokens + new_tokens > tokens_per_pass
            if taken and (is_full or total_keys + length > KEYS_PER_TOKEN * tokens_per_pass):
                yield taken
                taken, total_tokens, total_keys, new_tokens = {}, 0, 0, length
            taken.setdefault(slot, []).append(row)
            total_tokens, total_keys = total_tokens + new_tokens, total_keys + length
    if taken:
        yield taken
