"""`python -m tests.benchmarks.connections [WORKERS:SECONDS ...]`: worker processes on one PostgreSQL.

Each has a connection of its own and an engine that waits (`simulated`): four slots, a rung every so many
SECONDS. Measured from when all have opened the study until the last trial ends.
"""

import sys
import time
from multiprocessing.synchronize import Barrier

from tests.benchmarks.scale import cpu_seconds
from tests.benchmarks.simulated import train
from tests.processes import FORKS
from tests.servers import real_postgres, sqlalchemy_uri

TRIALS_EACH, PATIENCE = 8, 600.0
SIZES = ("16:5", "64:20", "256:60")


def be_worker(
    storage: str, n_trials: int, seconds: float, together: Barrier, told: "FORKS.Queue[int]"
) -> None:  # type: ignore[name-defined]
    told.put(train(storage, n_trials, seconds, lambda _: together.wait(PATIENCE)))


def measure(workers: int, rung_seconds: float) -> str:
    """Return a row of the table."""
    with real_postgres() as server:
        server.psql(f"ALTER SYSTEM SET max_connections = {2 * workers + 50}")
        server.stop()
        server.start()
        told, n_trials, together = FORKS.Queue(), workers * TRIALS_EACH, FORKS.Barrier(workers + 1)
        rest = (sqlalchemy_uri(server), n_trials, rung_seconds, together, told)
        crew = [FORKS.Process(target=be_worker, args=rest) for _ in range(workers)]
        for one in crew:
            one.start()
        together.wait(PATIENCE)
        computed, begin = cpu_seconds(server), time.monotonic()
        counts = [told.get(timeout=PATIENCE) for _ in crew]
        seconds = time.monotonic() - begin
        for one in crew:
            one.join(60)
        busy = cpu_seconds(server) - computed
    rates = f"{sum(counts) / seconds:,.0f} | {busy / seconds:.2f}"
    return f"| {workers} | {rung_seconds:.0f} | {n_trials} | {seconds:.0f} | {rates} |\n"


def main() -> None:
    heads = ("workers", "seconds a rung", "trials", "seconds", "statements/s", "server's cores")
    sys.stdout.write(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n")
    for size in sys.argv[1:] or SIZES:
        workers, _, seconds = size.partition(":")
        sys.stdout.write(measure(int(workers), float(seconds or 5)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
