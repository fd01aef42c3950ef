"""Which rows share a pass. Pure: no torch, no I/O. Never splits a row; never mixes two optimizer steps of
one trial."""

from collections.abc import Sequence


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
