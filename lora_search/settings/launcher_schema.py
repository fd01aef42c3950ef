"""The settings of the launcher: which processes train, and on which machines."""

import re
import shlex
from dataclasses import dataclass

from lora_search.settings.rules import require, require_choice, require_range

OF = {  # setting -> the launchers that read it
    "workers": ("local", "ray", "slurm"),
    "cpus_per_worker": ("ray", "slurm"),
    "gpus_per_worker": ("ray", "slurm"),
    "address": ("ray",),
    "partition": ("slurm",),
    "minutes": ("slurm",),
    "sbatch": ("slurm",),
    "cluster": ("slurm",),
}
MOST_WORKERS = 10_000


@dataclass(kw_only=True)
class LauncherConfig:
    """Which processes train. May differ between two starts of one study."""

    name: str = "inline"  # this process; local: a worker per visible GPU; ray, slurm: workers on a cluster
    workers: int | None = None  # null: one per GPU (slurm: one); without a GPU one
    max_restarts: int = 3  # how often to start a worker again that a signal killed
    cpus_per_worker: int | None = None  # ray, slurm: null is 1
    gpus_per_worker: float | None = (
        None  # ray, slurm: null is engine.devices_per_worker (ray: if it has GPUs)
    )
    address: str | None = None  # ray: of a running cluster; null: RAY_ADDRESS, else one on this machine
    partition: str | None = None  # slurm
    minutes: int | None = None  # slurm: the time limit of a job; null is 240
    sbatch: str | None = None  # slurm: more of sbatch's options, "--account=mine --mem=64G"
    cluster: str | None = None  # slurm: null is slurm; local runs the jobs on this machine, to try it
    worker: int | None = None  # set by launchers for the processes that they start

    def __post_init__(self) -> None:
        require_choice("launcher.name", self.name, ("inline", "local", "ray", "slurm"))
        for key, least, most in (
            ("workers", 1, MOST_WORKERS), ("max_restarts", 0, 1000), ("worker", 0, 10 * MOST_WORKERS),
            ("cpus_per_worker", 1, 4096), ("gpus_per_worker", 0, 64), ("minutes", 2, 525_600),
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None:
                require_range(f"launcher.{key}", value, least, most)
        for key, names in OF.items():
            value, listed = getattr(self, key), " or ".join(names)
            require(value is None or self.name in names, f"launcher.{key}", value,
                    f"is for launcher={listed} only", f"Add launcher={names[0]}")  # fmt: skip
        share = self.gpus_per_worker or 0
        require(share == int(share) or (self.name == "ray" and share < 1), "launcher.gpus_per_worker", share,
                "must be a whole number, or with launcher=ray a share below 1")  # fmt: skip
        require_choice("launcher.cluster", self.cluster or "slurm", ("slurm", "local"))
        self.sbatch_options()

    def sbatch_options(self) -> dict[str, str | bool]:
        """Return sbatch's further options by name; a flag has the value True. Raises ConfigError."""
        try:
            words = shlex.split(self.sbatch or "")
        except ValueError:
            words = ["'"]
        is_readable = all(re.fullmatch(r"--[a-z][a-z0-9-]*(=.+)?", word) for word in words)
        remedy = "Try launcher.sbatch='--account=mine --mem=64G'"
        require(is_readable, "launcher.sbatch", self.sbatch, "must be options as --name=value", remedy)
        parts = (word.removeprefix("--").partition("=") for word in words)
        return {name: value if equals else True for name, equals, value in parts}
