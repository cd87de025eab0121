"""The example scripts on a real Slurm: an array, a warned task that goes on later, the merge after it."""

import time
from pathlib import Path

from conftest import ROOT
from slurm import Slurm
from test_faults import Case
from virnucpro_cli import shards, store
from virnucpro_cli.shards import Shard

EXAMPLES = ROOT / "examples" / "slurm"


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
