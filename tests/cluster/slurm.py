"""A real Slurm on this machine: munged, slurmctld and one slurmd as Debian packages them, in one folder."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
IS_HERE = all(shutil.which(name, path=PATH) for name in PROGRAMS) and os.geteuid() == 0
REMEDY = "as root: apt install slurm-wlm munge"
START_SECONDS, END_SECONDS = 30, 60  # a job has KillWait to end by itself
# One partition whose jobs are cancelled for those of another. Without cred_expire Slurm lets a job that was
# queued again wait for two minutes.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={port}
SlurmdPort={second_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
KillWait=30
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=CANCEL GraceTime=60 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


@contextmanager
def real_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start it; yield the environment in which sbatch and its like find it."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    port, second_port = free_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=socket.gethostname(), port=port, second_port=second_port,
                                cpus=os.cpu_count()))  # fmt: skip
    environment = {"SLURM_CONF": str(conf), "PATH": PATH}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    lines = [munge, ["slurmctld", "-D", "-L", f"{folder}/slurmctld.log"],
             ["slurmd", "-D", "-L", f"{folder}/slurmd.log"]]  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []
    try:
        for line in lines:
            out = (folder / f"{line[0]}.out").open("wb")
            started.append(subprocess.Popen(line, env={**os.environ, **environment}, stdout=out, stderr=out))
        wait_for_node(environment, folder)
        yield environment
    finally:
        if len(started) == len(lines):
            cancel_jobs(environment)  # their processes would outlive slurmd
        for process in reversed(started):
            process.terminate()
            process.wait(60)


def wait_for_node(environment: dict[str, str], folder: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while "idle" not in run(environment, "sinfo", "--noheader", "--format=%T"):
        logs = "".join(path.read_text() for path in folder.glob("slurm*.log"))
        assert time.monotonic() < until, logs
        time.sleep(0.5)


def cancel_jobs(environment: dict[str, str]) -> None:
    """End all jobs, of whichever test; come back when none of their processes is left."""
    until = time.monotonic() + END_SECONDS
    run(environment, "scancel", "--user=root")
    while run(environment, "squeue", "--noheader") and time.monotonic() < until:
        time.sleep(0.5)


def run(environment: dict[str, str], *command: str) -> str:
    """Return what one of Slurm's commands says."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    return done.stdout


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
