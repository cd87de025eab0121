"""What a run may write to, and what it survives losing: inputs are safe, links are followed, a dead terminal is no fault."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.store import read_embeddings

Make = Callable[..., Path]


def test_an_input_is_never_overwritten(make_fasta: Make, tiny_model: Path) -> None:
    path = make_fasta([20, 30])
    text = path.read_bytes()
    with pytest.raises(UserError, match="one of the inputs"):
        embed_fasta(str(path), str(path), model=str(tiny_model), overwrite=True)
    with pytest.raises(UserError, match="would overwrite"):
        embed_fasta(str(path), str(path.with_suffix(".h5")), model=str(tiny_model), report=str(path))
    assert path.read_bytes() == text


@pytest.mark.parametrize("report", ["out.h5", "out.h5.partial", "nowhere/r.json", "."])
def test_a_report_without_a_place_is_refused_before_the_work(
    make_fasta: Make, tiny_model: Path, tmp_path: Path, report: str
) -> None:
    with pytest.raises(UserError, match="report"):
        embed_fasta(
            str(make_fasta([20])), str(tmp_path / "out.h5"), model=str(tiny_model), report=str(tmp_path / report)
        )
    assert not (tmp_path / "out.h5").exists()


def test_an_output_that_is_no_file_is_refused(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.h5")
    with pytest.raises(UserError, match="not a regular file"):
        embed_fasta(str(make_fasta([20])), str(tmp_path / "out.h5"), model=str(tiny_model), overwrite=True)


def test_a_link_is_followed_to_where_it_points(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "link.h5").symlink_to("real.h5")
    embed_fasta(str(make_fasta([20])), str(tmp_path / "link.h5"), model=str(tiny_model), device="cpu")
    assert (tmp_path / "link.h5").is_symlink()
    with read_embeddings(tmp_path / "real.h5") as file:
        assert len(file) == 1


def test_a_nucleotide_file_among_proteins_is_named(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    genes = tmp_path / "genes.fasta"
    genes.write_text(">gene\n" + "ACGT" * 20 + "\n")
    with pytest.raises(UserError, match=r"genes\.fasta looks like nucleotides"):
        embed_fasta([str(make_fasta([400])), str(genes)], str(tmp_path / "out.h5"), model=str(tiny_model))


def test_embeddings_is_the_last_requested_layer_even_if_it_was_named_before(
    make_fasta: Make, tiny_model: Path, tmp_path: Path
) -> None:
    embed_fasta(str(make_fasta([20])), str(tmp_path / "out.h5"), model=str(tiny_model), layers=(2, 0, -1), device="cpu")
    with read_embeddings(tmp_path / "out.h5") as file:
        assert np.array_equal(file[:], file.dataset("mean", 2)[:])


@pytest.mark.parametrize("stderr", ["broken pipe", "full", "closed"])
def test_a_run_outlives_its_terminal(make_fasta: Make, tiny_model: Path, tmp_path: Path, stderr: str) -> None:
    out = tmp_path / "out.h5"
    ends = {"broken pipe": "2> >(true)", "full": "2>/dev/full", "closed": "2>&-"}[stderr]
    command = f"exec {sys.executable} -m virnucpro_cli embed {make_fasta([2000, 30])} -o {out} --model {tiny_model} --device cpu {ends}"
    done = subprocess.run(["bash", "-c", command], check=False, timeout=120)
    assert done.returncode == 0
    with read_embeddings(out) as file:
        assert file.complete and len(file) == 2
