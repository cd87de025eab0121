"""The example scripts on a real Slurm of one node, started here: an array, a warned task that goes on later, the merge after it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from test_faults import Case
from virnucpro_cli import shards, store
from virnucpro_cli.shards import Shard

EXAMPLES = ROOT / "examples" / "slurm"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
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
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=500 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
SLOW = """
import sys, time
if "embed" in sys.orig_argv:
    from virnucpro_cli import runner
    serial = runner.serial
    def slow(items, collate, compute, sink, device):
        serial(items, collate, lambda batch: (time.sleep(0.4), compute(batch))[1], sink, device)
    runner.serial = slow
"""


class Slurm:
    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SLOW)
        self.environment = {
            **os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(folder / "site"),
        }  # fmt: skip

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, cwd=self.folder
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """Of the jobs that have not ended: 12_3 -> RUNNING."""
        return dict(line.split(maxsplit=1) for line in self("squeue", "-h", "-r", "-o", "%i %T %r %S").splitlines())

    def wait(self, what: str, true: Callable[[], object], seconds: float = 60) -> None:
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
        deadline = time.monotonic() + 30
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


def test_the_array_script_is_warned_requeued_and_merged(slurm: Slurm, tmp_path: Path) -> None:
    case = Case(tmp_path, 400)
    output = slurm.folder / "out.h5"
    options = ["--model", str(case.model), "--device", "cpu", "--token-budget", "1024", "--pool", "mean,bos,residue",
               "--long", "window", "--max-residues", "200", "--overlap", "50"]  # fmt: skip
    job = slurm(
        "sbatch",
        "--parsable",
        "--array=1-3",
        str(EXAMPLES / "embed_array.sbatch"),
        str(case.fasta),
        str(output),
        *options,
    )
    slurm("sbatch", f"--dependency=afterok:{job}", str(EXAMPLES / "merge.sbatch"), str(output))
    second = store.partial_path(shards.path(output, Shard(2, 3)))
    slurm.wait("the second task never began", second.exists)
    time.sleep(1.5)  # for some packs, of some five seconds' worth
    slurm("scancel", "--signal=USR1", "--batch", f"{job}_2")  # as --signal does before the time is up
    slurm.wait("it was not put into the queue again", lambda: slurm.states().get(f"{job}_2", "").startswith("PENDING"))
    there = sorted(path.name for path in slurm.folder.glob("*.h5*"))
    assert not output.exists() and second.exists(), f"{slurm.states()}, {there}, {slurm.logs()}"
    slurm("scontrol", "update", f"JobId={job}_2", "StartTime=now")  # Slurm would hold it for two minutes
    slurm.wait("the merge did not come about", lambda: output.exists() and not slurm.states(), 40)
    case.check_rows(output)
    told = (slurm.folder / f"slurm-{job}_2.out").read_text()
    assert "stopped by SIGUSR1" in told and " of 134 proteins are there already" in told, told
    assert "resuming" in told and ": 0 of 134" not in told and "Traceback" not in told, told
