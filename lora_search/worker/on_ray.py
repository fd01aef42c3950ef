"""launcher=ray: one seat (an actor) per GPU of a Ray cluster, or launcher.workers seats on its CPUs.

Ray places the seats and starts those of a lost node again elsewhere; trials, retries and totals are the
study's. A seat ends with its driver: the same command continues a sweep whose driver was killed. Settings
reach a seat as an argument, in memory. Importing this module does not import Ray.
"""

import importlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_search.database.sqlite_file import TO_A_SERVER
from lora_search.errors import ConfigError, InputError
from lora_search.failures import first_line
from lora_search.settings.rules import require_devices
from lora_search.settings.schema import LauncherConfig, SweepConfig, require
from lora_search.settings.secrets import redact
from lora_search.worker.interrupts import SIGNALS
from lora_search.worker.seat import Order, Reports, Seat
from lora_search.worker.team import check_workers

EXACT = 1e-4  # Ray counts resources in ten-thousandths
FOR_EVER = -1  # Ray's word: a node may come back at any time


@dataclass
class Place:
    """An actor, and the call that it has not answered yet."""

    actor: Any
    call: Any = None
    is_here: bool = False  # whether it has answered since Ray started it


class RayTeam:
    """All seats of one driver. On exit from the context all of them have ended."""

    shows_logs = True

    def __init__(self, config: SweepConfig, order: Order, logs: Path) -> None:
        """Raises InputError where Ray is missing."""
        self._ray = load("ray", "ray")
        self._config, self._order = config, order
        self._reports, self._seats = Reports(logs), dict[int, Place]()
        self._options: dict[str, Any] = {}

    def __enter__(self) -> "RayTeam":
        """Connect, and ask for the seats. Raises ConfigError."""
        connect(self._ray, self._config.launcher)
        try:
            self._options = self._placement()
            count = self._config.launcher.workers or max(1, self._room())
            check_workers(self._config, count)
            for _ in range(count):
                self._add()
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Have the workers put their trials back. A second interrupt ends this process, and they with it."""
        stops = [seat.actor.stop.remote() for seat in self._seats.values() if seat.is_here]
        if stops:
            self._ray.wait(stops, num_returns=len(stops))  # one on a node that is lost just now fails in time
        self._ray.shutdown()

    @property
    def places(self) -> str:
        """Return where the workers go, in words."""
        need = ", ".join(f"{value:g} {name}" for name, value in self._need.items() if value)
        return f"{len(self._seats)} on a Ray cluster of {len(self._nodes())} nodes, {need} each"

    @property
    def is_at_work(self) -> bool:
        """Whether some worker may still train."""
        open_seats = [seat for number, seat in self._seats.items() if number not in self._reports.ended]
        return any(seat.is_here for seat in open_seats) if self._reports.is_finished else bool(open_seats)

    def look(self) -> list[str]:
        """Ask all seats; return what they say. Add seats where there is room.

        Raises InputError if a worker found wrong input.
        """
        asked = {number: seat for number, seat in self._seats.items() if number not in self._reports.ended}
        for seat in asked.values():
            seat.call = seat.call or seat.actor.look.remote()
        calls = {seat.call: number for number, seat in asked.items()}
        answered, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0.5)
        news = [line for call in answered for line in self._answer(calls[call])]
        return [*news, *self._grow()]

    def check_someone_finished(self) -> None:
        """Raise LoraSearchError if no worker reached the end of the study."""
        self._reports.check_someone_finished()

    def _answer(self, number: int) -> list[str]:
        seat = self._seats[number]
        call, seat.call = seat.call, None
        try:
            report = self._ray.get(call)
        except self._ray.exceptions.RayActorError as error:
            if getattr(error, "actor_init_failed", False):
                raise not_installed(str(error)) from None
            was_here, seat.is_here = seat.is_here, False
            lost = f"worker {number} is lost with its node; Ray starts it again where there is room"
            return [lost] if was_here else []
        seat.is_here = True
        return self._reports.take(number, report)

    def _grow(self) -> list[str]:
        """Add seats where the cluster has room for more: a node has joined, or another driver has ended."""
        is_waiting = any(not seat.is_here for seat in self._seats.values())
        is_fixed = self._config.launcher.workers or self._config.study.storage.startswith("sqlite")
        if is_fixed or is_waiting or self._reports.is_finished:
            return []
        return [self._add() for _ in range(self._room())]

    def _add(self) -> str:
        number = len(self._seats)
        actor = self._ray.remote(Seat).options(**self._options).remote(self._order, number)
        self._seats[number] = Place(actor)
        return f"worker {number} was added: the cluster has room for it"

    def _placement(self) -> dict[str, Any]:
        """Return the options of a seat's actor. SQLite is a file of one machine: its seats stay here."""
        options = {"num_cpus": self._need["CPU"], "num_gpus": self._need["GPU"], "max_restarts": FOR_EVER}
        most = max((int(node["Resources"].get("GPU", 0)) for node in self._nodes()), default=0)
        size = self._config.engine.devices_per_worker
        require_devices(size, most, "the GPUs of the cluster's largest node", "the cluster has")
        if not self._config.study.storage.startswith("sqlite"):
            return {**options, "scheduling_strategy": "SPREAD"}
        count, storage = len(self._nodes()), redact(self._config.study.storage)
        rule = f"must be a database server, since the Ray cluster has {count} nodes"
        require(count == 1, "study.storage", storage, rule, TO_A_SERVER)
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        here = self._ray.get_runtime_context().get_node_id()
        return {**options, "scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(here, soft=False)}

    @property
    def _need(self) -> dict[str, float]:
        """Return what one seat takes of Ray's resources."""
        launcher, has_gpus = self._config.launcher, self._ray.cluster_resources().get("GPU", 0) > 0
        gpus = launcher.gpus_per_worker
        if gpus is None:
            gpus = self._config.engine.devices_per_worker if has_gpus else 0
        return {
            "CPU": launcher.cpus_per_worker or 1,
            "GPU": 0 if self._config.engine.device == "cpu" else gpus,
        }

    def _room(self) -> int:
        """Return for how many more seats the cluster has room now; 0 without GPUs, where the user chooses."""
        if not self._need["GPU"]:
            return 0
        free = importlib.import_module("ray._private.state").available_resources_per_node()
        return sum(_seats(node, self._need) for node in free.values())

    def _nodes(self) -> list[Mapping[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]


def _seats(free: Mapping[str, float], need: Mapping[str, float]) -> int:
    """Return how many seats fit on a node. A share of a GPU is of one: 0.6 fits on two GPUs twice."""
    gpus, cpus = free.get("GPU", 0), free.get("CPU", 0)
    share = need["GPU"]
    fit = int(gpus) * int(1 / share + EXACT) if share < 1 else int(gpus // share)
    return min(fit, int(cpus // need["CPU"]))


def connect(ray: Any, config: LauncherConfig) -> None:
    """Connect to the cluster, or start one on this machine. Raises ConfigError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that starts here sends nothing
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with same_signals():
            ray.init(
                address=config.address,
                include_dashboard=None if config.address else False,
                log_to_driver=False,
                configure_logging=False,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        rule = f"must be a Ray cluster that answers ({first_line(error)})"
        remedy = "Start one with ray start --head, or leave launcher.address out"
        raise ConfigError("launcher.address", config.address, rule, remedy) from None


@contextmanager
def same_signals() -> Iterator[None]:
    """Keep this process's handlers of signals: Ray sets its own."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load(module: str, extra: str) -> Any:
    """Return an optional library. Raises InputError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"launcher={extra}: needs {module}, which is missing. Run: pip install 'lora-search[{extra}]'"
        ) from None


def not_installed(said: str) -> InputError:
    """Return the error for a node that cannot start a seat."""
    cause = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "no cause given")
    return InputError(
        f"launcher=ray: a node cannot start a worker: {redact(cause)}. Install lora_search there, as here."
    )
