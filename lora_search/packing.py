"""Which rows share a pass. Pure: no torch, no I/O. Never splits a row; never mixes two optimizer steps of
one trial."""

from collections.abc import Iterator, Sequence


def fill_pass(pending_lengths: Sequence[Sequence[int]], tokens_per_pass: int) -> list[int]:
    """Return how many rows to take from the front of each queue, at most ``tokens_per_pass`` tokens in all.

    The queue that has the fewest tokens so far comes next, so every slot advances at the same pace. A
    single row longer than the budget still goes through, alone.
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
    first, last = min(rows), max(rows)  # what the first and the last in order share, all share
    different = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(different, min(len(first), len(last)))


def passes_in_order(
    num_slots: int, lengths: Sequence[int], num_shared: int, tokens_per_pass: int
) -> Iterator[dict[int, list[int]]]:
    """Yield passes over all rows of all slots, as slot to row numbers: slot after slot, so that what a slot's
    rows share, the first ``num_shared`` tokens, is computed in few passes."""
    taken: dict[int, list[int]] = {}
    total_tokens = 0
    for slot in range(num_slots):
        for row, length in enumerate(lengths):
            new_tokens = length - num_shared if slot in taken else length
            if taken and total_tokens + new_tokens > tokens_per_pass:
                yield taken
                taken, total_tokens, new_tokens = {}, 0, length
            taken.setdefault(slot, []).append(row)
            total_tokens += new_tokens
    if taken:
        yield taken
