"""The example scripts on a real Slurm: an array, a warned task that goes on later, the merge after it."""

import time
from pathlib import Path

import pytest

from conftest import ROOT
from slurm import Slurm
from test_faults import Case, datasets
from virnucpro_cli import store
from virnucpro_cli.plan import shards
from virnucpro_cli.plan.shards import Shard

EXAMPLES = ROOT / "examples" / "slurm"


@pytest.mark.slow
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
        "3",
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
    slurm.wait("the merge did not come about", lambda: output.exists() and not slurm.states())
    case.check_rows(output)
    told = (slurm.folder / f"slurm-{job}_2.out").read_text()
    assert "stopped by SIGUSR1" in told and " of 134 proteins there already" in told, told
    assert "resuming" in told and ": 0 of 134" not in told and "Traceback" not in told, told


@pytest.mark.slow
def test_tasks_that_are_submitted_again_compute_their_own_shards(slurm: Slurm, tmp_path: Path) -> None:
    case = Case(tmp_path, 20)
    output = slurm.folder / "out.h5"
    parts = {number: shards.path(output, Shard(number, 4)) for number in range(1, 5)}

    def submit(array: str, *arguments: str) -> None:
        slurm("sbatch", f"--array={array}", *arguments, "--model", str(case.model), "--device", "cpu", "--pool", "mean,bos,residue",
              "--long", "window", "--max-residues", "200", "--overlap", "50")  # fmt: skip
        slurm.wait(f"the array {array} did not end", lambda: not slurm.states())

    script, names = str(EXAMPLES / "embed_array.sbatch"), (str(case.fasta), str(output))
    submit("1-4", script, "4", *names)
    expected = {number: datasets(path) for number, path in parts.items()}
    for array, again in (("3", (3,)), ("2,4", (2, 4)), ("1", (1,))):
        for number in again:
            parts[number].unlink()
        submit(array, script, "4", *names)
        assert sorted(slurm.folder.glob("out.*h5*")) == sorted(parts.values())
        for number in again:
            found = datasets(parts[number])
            assert all(found[name].tobytes() == values.tobytes() for name, values in expected[number].items())
    parts[3].unlink()
    bare = ("--wrap", f'virnucpro embed {names[0]} -o {names[1]} --shard auto "$@"')
    slurm("sbatch", "--array=3", "--output=bare.out", *bare)
    slurm.wait("it did not end", lambda: not slurm.states())
    assert "begins at 3" in (slurm.folder / "bare.out").read_text() and not parts[3].exists()
