"""Seeds made of seeds. Never from a slot, the time, an order or a hash."""

import numpy as np


def draw_seed(*parts: int) -> int:
    """Return a seed made of others, e.g. the sweep's and a trial's number: the same wherever it is asked."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
