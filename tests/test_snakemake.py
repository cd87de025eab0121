"""The example workflow, run by a real Snakemake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from test_faults import Case, one_thread  # noqa: F401  (in force here too)

PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


@pytest.mark.skipif(
    shutil.which("snakemake", path=PATH) is None, reason="snakemake is not installed (pip install snakemake)"
)
def test_the_example_workflow_ends_at_the_single_runs_file(tmp_path: Path) -> None:
    case = Case(tmp_path, 60)
    folder = tmp_path / "work"
    folder.mkdir()
    options = (
        f"--model {case.model} --device cpu --token-budget 1024 --pool mean,bos,residue "
        "--long window --max-residues 200 --overlap 50"
    )
    command = [
        "snakemake", "-s", str(ROOT / "examples" / "snakemake" / "Snakefile"), "--cores", "2", "--config",
        f"fasta={case.fasta}", "output=out.h5", "shards=3", f"options={options}",
    ]  # fmt: skip
    environment = {**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second time there is nothing to do
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "Nothing to be done" in done.stderr
    case.check_rows(folder / "out.h5")
