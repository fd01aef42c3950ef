"""`python -m tests.benchmarks.connections [WORKERS ...]`: the load of worker processes on one PostgreSQL.

Each has a connection of its own and an engine that waits (`simulated`): four slots, a rung every
RUNG_SECONDS. A rung of a real model takes a minute, so that one of these is as much load as a dozen of them.
"""

import sys
import time

from tests.benchmarks.scale import cpu_seconds
from tests.benchmarks.simulated import train
from tests.processes import FORKS
from tests.servers import real_postgres, sqlalchemy_uri

RUNG_SECONDS, TRIALS_EACH = 5.0, 12


def be_worker(storage: str, n_trials: int, told: "FORKS.Queue[int]") -> None:  # type: ignore[name-defined]
    told.put(train(storage, n_trials, RUNG_SECONDS))


def measure(workers: int) -> str:
    """Return a row of the table."""
    with real_postgres() as server:
        storage, told, n_trials = sqlalchemy_uri(server), FORKS.Queue(), workers * TRIALS_EACH
        crew = [FORKS.Process(target=be_worker, args=(storage, n_trials, told)) for _ in range(workers)]
        computed, begin = cpu_seconds(server), time.monotonic()
        for one in crew:
            one.start()
        counts = [told.get(timeout=300) for _ in crew]
        seconds = time.monotonic() - begin
        for one in crew:
            one.join(60)
        busy = cpu_seconds(server) - computed
    return (
        f"| {workers} | {n_trials} | {seconds:.0f} | {sum(counts) / seconds:,.0f} | {busy / seconds:.2f} |\n"
    )


def main() -> None:
    sys.stdout.write(
        "| workers | trials | seconds | statements/s | server's cores |\n|---|---|---|---|---|\n"
    )
    for workers in [int(word) for word in sys.argv[1:]] or [4, 16, 64]:
        sys.stdout.write(measure(workers))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
