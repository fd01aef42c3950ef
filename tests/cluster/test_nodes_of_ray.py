"""A Ray cluster of three nodes, with real PostgreSQL and S3, loses a worker, a node and its driver."""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lora_search.errors import LoraSearchError
from lora_search.settings.schema import StudyConfig
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow
from tests.cluster.nodes import CAN_BE_MADE, Node, address, ray_cluster
from tests.servers import real_postgres, real_s3, sqlalchemy_uri

ROOT = Path(__file__).parents[2]
TRIALS = 4
SWEEP = [sys.executable, "-m", "lora_search.sweep", "-cn", "smoke", "engine.device=cpu", "engine.slots=1",
         "pruner=none", "sampler=random", "optim.lr=5e-3", "lora.dropout=0.1", f"study.n_trials={TRIALS}",
         "train.epochs=16", "study.heartbeat_seconds=1", "runs_dir=${oc.env:DISK}/runs"]  # fmt: skip


def rows_of(storage: str) -> list[TrialRow]:
    try:
        return StudyView(StudyConfig(name="smoke", storage=storage)).rows()
    except LoraSearchError:
        return []  # there is no study yet


class Sweep:
    """The sweep as its test watches it: how far it is by its database, where it trains, what drivers say."""

    def __init__(self, storage: str, nodes: dict[str, Node], folder: Path) -> None:
        self.storage, self.nodes, self.folder = storage, nodes, folder

    def start(self, log: str, command: list[str]) -> None:
        self.driver = self.nodes["a"].start(command, self.folder / log)

    def busy(self, without: str = "") -> list[Node]:
        return [node for node in self.nodes.values() if node.name not in without and node.workers()]

    def trained_on(self, names: str) -> list[TrialRow]:
        """Return the running trials that have got somewhere on these nodes."""
        running = [row for row in rows_of(self.storage) if row.state == "RUNNING" and row.worker]
        return [row for row in running if row.worker[0] in names and len(row.perplexities) > 4]

    def wait_for_rungs(self, more: int) -> None:
        wanted = self.rungs() + more
        self.wait_until(lambda: self.rungs() >= wanted)

    def wait_until(self, is_so: Callable[[], object]) -> None:
        until = time.monotonic() + 120
        while not is_so():
            is_in_time = time.monotonic() < until and self.driver.poll() is None
            assert is_in_time, [path.read_text() for path in self.folder.glob("*.log")]
            time.sleep(0.1)

    def rungs(self) -> int:
        return sum(len(row.perplexities) for row in rows_of(self.storage))


@pytest.mark.slow
@pytest.mark.skipif(not CAN_BE_MADE, reason="needs root, or user namespaces (unshare --user)")
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed: make test-cluster")
def test_a_worker_a_node_and_the_driver_are_killed_and_the_values_are_those_of_one_process(
    tmp_path: Path,
) -> None:
    alone = f"sqlite:///{tmp_path}/alone.db"
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (
        real_postgres() as server,
        real_s3() as keys,
        tempfile.TemporaryDirectory(prefix="ray") as folder,  # Unix sockets have short names
        ray_cluster(Path(folder), "abc", {**environment, **keys}) as nodes,
    ):
        head, storage = nodes["a"], sqlalchemy_uri(server)
        cluster = ["launcher=ray", f"launcher.address={address(head)}", "launcher.workers=2"]
        sweep = [*SWEEP, *cluster, f"study.storage={storage}", "artifacts.uri=s3://bucket/runs"]

        watch = Sweep(storage, nodes, tmp_path)

        watch.start("first.log", sweep)
        watch.wait_for_rungs(4)
        watch.busy()[0].workers()[0].kill()
        watch.wait_until(lambda: watch.trained_on("bc"))

        lost = watch.trained_on("bc")[0]
        watch.nodes[lost.worker[0]].lose()
        watch.wait_until(lambda: len(watch.busy(without=lost.worker[0])) == 2)
        watch.wait_for_rungs(8)

        psutil.Process(watch.driver.pid).children()[0].kill()
        watch.driver.wait(60)
        watch.start("again.log", sweep)
        watch.driver.wait(300)
        rows = rows_of(storage)
        said = [(tmp_path / name).read_text() for name in ("first.log", "again.log")]

    whole = subprocess.run(
        [*SWEEP, f"study.storage={alone}"], capture_output=True, text=True, cwd=tmp_path,
        env={**environment, "DISK": str(tmp_path / "alone")},
    )  # fmt: skip
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert watch.driver.returncode == 0, said
    assert [row.state for row in rows] == ["COMPLETE"] * TRIALS
    assert [row.perplexities for row in rows] == [row.perplexities for row in rows_of(alone)]
    assert rows[lost.number].worker[0] != lost.worker[0]
    # What had not been copied when the node was lost is trained again, the rest is not.
    assert "restarted from the beginning" not in rows[lost.number].recovery
