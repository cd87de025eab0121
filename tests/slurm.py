"""A real Slurm of one node, started for a test: pretended GPUs and memory, no accounting, and a virnucpro slow enough to interrupt."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import slowed

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={port}
SlurmdPort={other_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SchedulerParameters=sched_interval=1,batch_sched_delay=1
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=64000 Gres=gpu:2 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
SRUN = """#!/bin/sh
# Snakemake's plugin takes every SLURM_ variable away from it; a cluster has the configuration where srun looks without one.
SLURM_CONF={folder}/slurm.conf exec {srun} "$@"
"""


class Slurm:
    def __init__(self, folder: Path):
        self.folder = folder
        site = slowed.packs(folder / "site", 0.4, "embed")
        (folder / "bin").mkdir()
        (folder / "bin" / "srun").write_text(SRUN.format(folder=folder, srun=shutil.which("srun", path=PATH)))
        (folder / "bin" / "srun").chmod(0o755)
        self.environment = {
            **os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/bin:{PATH}", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))),
        }  # fmt: skip

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=600, cwd=self.folder
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """Of the jobs that have not ended: 12_3 -> RUNNING."""
        return dict(line.split(maxsplit=1) for line in self("squeue", "-h", "-r", "-o", "%i %T %r %S").splitlines())

    def wait(self, what: str, true: Callable[[], object], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"{what}; jobs: {self.states()}; {self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.folder.glob("*.out"))


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    lacking = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if lacking or os.geteuid() != 0:
        pytest.skip(f"a Slurm needs root and {', '.join(lacking) or 'nothing else'} (Debian: slurm-wlm, munge)")
    folder = tmp_path_factory.mktemp("slurm")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, host=host, port=ports[0], other_port=ports[1], cpus=os.cpu_count())
    )
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # devices, for slurmd
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    cluster, daemons = Slurm(folder), []
    commands = (
        ("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
        ("slurmctld", "-D"), ("slurmd", "-D", "-N", host),
    )  # fmt: skip
    try:
        for command in commands:
            log = open(folder / f"{command[0]}.out", "w")  # noqa: SIM115
            daemons.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log))
            time.sleep(1)
        deadline = time.monotonic() + 600
        while (
            "idle"
            not in subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env=cluster.environment, capture_output=True, text=True
            ).stdout
        ):
            if time.monotonic() > deadline:
                pytest.skip(f"Slurm does not start here: {cluster.logs()}")
            time.sleep(0.2)
        yield cluster
        subprocess.run(["scancel", "--me"], env=cluster.environment, capture_output=True)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
