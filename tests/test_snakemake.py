"""The example workflow, run by a real Snakemake: on this machine, and with its profile on a real Slurm."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from slurm import Slurm
from test_faults import Case, one_thread  # noqa: F401  (in force here too)
from virnucpro_cli import store
from virnucpro_cli.plan import shards
from virnucpro_cli.plan.shards import Shard

EXAMPLES = ROOT / "examples" / "snakemake"
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


@pytest.fixture(scope="module")
def snakemake() -> str:
    """What its --help says."""
    if shutil.which("snakemake", path=PATH) is None:
        pytest.skip("snakemake is not installed (pip install snakemake)")
    environment = {**os.environ, "PATH": PATH}
    return subprocess.run(["snakemake", "--help"], env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def slurm_plugin(snakemake: str) -> None:
    if "--slurm-status-command" not in snakemake:
        pytest.skip("Snakemake has no plugin for Slurm (pip install snakemake-executor-plugin-slurm)")


def command(case: Case, shards: int, *how: str) -> list[str]:
    options = (
        f"--model {case.model} --device cpu --token-budget 1024 --pool mean,bos,residue "
        "--long window --max-residues 200 --overlap 50"
    )
    return [
        "snakemake", "-s", str(EXAMPLES / "Snakefile"), *how, "--config",
        f"fasta={case.fasta}", "output=out.h5", f"shards={shards}", f"options={options}",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("snakemake")
def test_the_example_workflow_ends_at_the_single_runs_file(tmp_path: Path) -> None:
    case = Case(tmp_path, 60)
    folder = tmp_path / "work"
    folder.mkdir()
    environment = {**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second time there is nothing to do
        done = subprocess.run(
            command(case, 2, "--cores", "2"), cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "Nothing to be done" in done.stderr
    case.check_rows(folder / "out.h5")


@pytest.mark.slow
@pytest.mark.usefixtures("slurm_plugin")
def test_on_slurm_a_cancelled_shard_is_tried_again_and_the_end_is_the_same(slurm: Slurm, tmp_path: Path) -> None:
    case = Case(tmp_path, 100)
    second = store.partial_path(shards.path(slurm.folder / "out.h5", Shard(2, 2)))
    quickly = ("--slurm-init-seconds-before-status-checks", "3", "--slurm-keep-successful-logs")
    with open(slurm.folder / "snakemake.out", "w") as log:
        workflow = subprocess.Popen(
            command(case, 2, "--profile", str(EXAMPLES / "slurm"), *quickly),
            cwd=slurm.folder, env=slurm.environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        slurm.wait("the second shard never began", second.exists)
        jobs = dict(line.split() for line in slurm("squeue", "-h", "-o", "%k %i").splitlines())
        job = jobs["rule_shard_wildcards_0002"]
        asked_for = slurm("scontrol", "show", "job", job)
        assert all(words in asked_for for words in ("gpu:1", "=16000M", "TimeLimit=12:00:00")), asked_for
        time.sleep(1)  # for some packs
        slurm("scancel", job)
        slurm.wait("the workflow did not end", lambda: workflow.poll() is not None)
    finally:
        workflow.kill()
        workflow.wait()
    assert workflow.returncode == 0, slurm.logs()
    case.check_rows(slurm.folder / "out.h5")
    cancelled, again = sorted((slurm.folder / ".snakemake" / "slurm_logs" / "rule_shard" / "0002").iterdir())
    assert "stopped by SIGTERM" in cancelled.read_text()
    told = again.read_text()
    assert "resuming" in told and ": 0 of " not in told, told
