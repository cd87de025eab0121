"""docs/recipes.md is run, block by block, with the demo model."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, VIRAL, read_fasta

BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.S)


@pytest.mark.demo
def test_every_recipe_runs(tmp_path: Path) -> None:
    for library in ("sklearn", "pandas", "pyrodigal_gv"):
        pytest.importorskip(library)
    shutil.copy(ROOT / "examples" / "contigs.fna", tmp_path)
    proteins = read_fasta(VIRAL)[:40]
    (tmp_path / "proteins.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in proteins))
    (tmp_path / "labels.tsv").write_text("".join(f"{name}\t{len(text) > 300}\n" for name, text in proteins))
    program = tmp_path / "bin" / "virnucpro"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m virnucpro_cli "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    for language, text in BLOCKS:
        text = re.sub(r"--model \S+", "--model demo", text)
        command = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, f"{text}\n{ran.stderr}"
    assert len(BLOCKS) == 8 and (tmp_path / "neighbours.tsv").read_text().count("\n") == 1 + 40 * 5
    assert {path.name for path in tmp_path.iterdir()} >= {"features", "per-protein.h5", "per-residue.h5", "map.html"}


@pytest.mark.parametrize("names", [["1", "007"], ["NA", "1e5"], ["x", "nan"]])
def test_labels_of_the_recipe_keep_names_that_look_like_numbers_or_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    Path("labels.tsv").write_text("".join(f"{name}\tvirus {name}\n" for name in names))
    lines = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("labels = ")]
    there: dict[str, object] = {}
    exec("\n".join(lines), {"pandas": pandas}, there)
    assert there["labels"].to_dict() == {name: f"virus {name}" for name in names}  # type: ignore[attr-defined]
