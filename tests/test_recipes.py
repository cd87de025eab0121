"""The recipes, the tutorial and the tour of the README are run, block by block."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, VIRAL, read_fasta


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the commands and programs on a page."""
    return re.findall(r"```(sh|python)\n(.*?)```", (ROOT / page).read_text(), re.S)


BLOCKS = blocks("docs/how-to/recipes.md")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables under which `virnucpro` is the program of this source tree."""
    program = tmp_path / "bin" / "virnucpro"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m virnucpro_cli "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """The standard output of a command that must succeed."""
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{command[-1]}\n{ran.stderr}"
    return ran.stdout


@pytest.mark.slow
def test_every_recipe_runs(tmp_path: Path, environment: dict[str, str], tiny_model: Path) -> None:
    for library in ("sklearn", "pandas", "pyrodigal_gv"):
        pytest.importorskip(library)
    shutil.copy(ROOT / "examples" / "contigs.fna", tmp_path)
    proteins = read_fasta(VIRAL)[:40]
    (tmp_path / "proteins.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in proteins))
    (tmp_path / "labels.tsv").write_text("".join(f"{name}\t{len(text) > 300}\n" for name, text in proteins))
    for language, text in BLOCKS:
        text = re.sub(r"--model \S+", f"--model {tiny_model}", text)
        run(["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text], tmp_path, environment)
    assert len(BLOCKS) == 8 and (tmp_path / "neighbours.tsv").read_text().count("\n") == 1 + 40 * 5
    assert {path.name for path in tmp_path.iterdir()} >= {"features", "per-protein.h5", "per-residue.h5", "map.html"}


@pytest.mark.slow
@pytest.mark.demo
def test_the_tutorial_runs_as_it_stands(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs are one session of Python, and its classifier does what the text says."""
    for library in ("sklearn", "pandas", "openTSNE", "plotly"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    session: dict[str, Any] = {}
    printed = ""
    for language, text in blocks("docs/tutorial.md"):
        if language == "sh":
            printed += run(["bash", "-euc", text], tmp_path, environment)
        else:
            exec(compile(text, "tutorial.md", "exec"), session)
    assert printed.count("PASS") == 2 and session["vector"].shape == (320,)
    assert session["score"] == pytest.approx(0.88, abs=0.05)
    assert {"map.html", "neighbours.tsv", "viral.tsv"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_tour_of_the_readme_runs(tmp_path: Path, environment: dict[str, str], tiny_model: Path) -> None:
    """After the first command, which installs; it is the first block of the page, and the tests are the second."""
    pytest.importorskip("umap")
    commands = [text for language, text in blocks("README.md") if language == "sh"]
    install, _, first = commands[0].partition(" && ")
    assert (install, commands[1]) == ("pip install .", "pip install -e '.[test]' && python -m pytest -n auto\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tour = next(text for text in commands if text.startswith("virnucpro map"))
    assert "PASS" in run(["bash", "-euc", first.replace("demo", str(tiny_model)) + tour], tmp_path, environment)
    assert (tmp_path / "map.html").is_file()


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


@pytest.mark.slow
def test_the_page_of_predictions_runs(tmp_path: Path, environment: dict[str, str], tiny_model: Path) -> None:
    """With small encoders, a head that stands for the published ones, and pysam's samtools."""
    pytest.importorskip("pysam")
    from heads import pickled_head
    from test_dnabert import SMALL, checkpoint, state_of

    small = checkpoint(tmp_path / "small", SMALL, state_of(SMALL))
    head = pickled_head(tmp_path / "head", SMALL.hidden + 32, 16)
    shim = tmp_path / "bin" / "samtools"
    shim.write_text(
        f"#!{sys.executable}\nimport sys, pysam\ngetattr(pysam, sys.argv[1])(*sys.argv[2:], catch_stdout=False)\n"
    )
    shim.chmod(0o755)
    shutil.copy(ROOT / "examples" / "contigs.fna", tmp_path)
    contigs = read_fasta(tmp_path / "contigs.fna")
    (tmp_path / "labels.tsv").write_text("".join(f"{name}\t{i % 2}\n" for i, (name, _) in enumerate(contigs)))
    reads = [(f"r{i}", contigs[0][1][150 * i : 150 * i + 300]) for i in range(8)]
    (tmp_path / "reads.fastq").write_text("".join(f"@{n}\n{text}\n+\n{'I' * len(text)}\n" for n, text in reads))
    sam = "".join(f"{n}\t4\t*\t0\t0\t*\t*\t0\t0\t{text}\t*\n" for n, text in reads)
    (tmp_path / "reads.sam").write_text("@HD\tVN:1.6\n" + sam)
    run(["samtools", "view", "-b", "-o", "reads.bam", "reads.sam"], tmp_path, environment)
    pages = blocks("docs/how-to/predict.md")
    for language, text in pages:
        lines = []
        for line in text.splitlines():
            if "virnucpro predict" in line:
                line += "" if ".h5" in line else f" --model {tiny_model} --nucleotide-model {small} --device cpu"
                line += "" if "--head" in line else f" --head {head}"
                line += "" if "--chunk" in line or ".h5" in line else " --chunk 500"
            lines.append(line)
        told = "\n".join(lines) if language == "sh" else text
        run(
            ["bash", "-euo", "pipefail", "-c", told] if language == "sh" else [sys.executable, "-c", told],
            tmp_path,
            environment,
        )
    for folder in ("predictions", "reads", "bam", "original", "compared", "cluster", "own"):
        assert {"prediction_results.txt", "contigs.tsv"} <= {path.name for path in (tmp_path / folder).iterdir()}
    tables = [
        (tmp_path / name / "contigs.tsv").read_bytes() for name in ("reads", "bam", "predictions", "cluster", "own")
    ]
    assert tables[0] == tables[1] and tables[2] == tables[3] != tables[4] and len(pages) == 6
