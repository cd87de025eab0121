"""`--nucleotide`: the slices behind VirNucPro's frames, and their rows, which are those of the slices embedded by themselves."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from children import CHILDREN
from conftest import read_fasta
from halves import stopped_in_the_half
from test_faults import child, one_thread  # noqa: F401  (one_thread is in force here too)
from test_genes import contents
from test_lucavirus import authors_model, checkpoint
from virnucpro_cli import read_embeddings, store
from virnucpro_cli.cluster import merge
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.engine import placer, second_pass
from virnucpro_cli.errors import UserError
from virnucpro_cli.exchange import export
from virnucpro_cli.features import contigs as genes
from virnucpro_cli.features.contigs import chunks
from virnucpro_cli.validation import verify

CODONS = dict(zip("TCAG", range(4), strict=True))
AMINO = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"

Embed = Callable[..., Path]


@pytest.fixture(scope="module")
def nucleotides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of nucleotides."""
    return checkpoint(tmp_path_factory.mktemp("nucleotides") / "small", "hub", authors_model())


@pytest.fixture(scope="module")
def contigs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five contigs, most of whose chunks have frames, and one that has none."""
    generator, path = random.Random(2), tmp_path_factory.mktemp("contigs") / "contigs.fna"
    bases = [without_stops(generator, length, "N") for length in (900, 600, 60, 2, 1100)]
    path.write_text("".join(f">c{i} sample\n{each}\n" for i, each in enumerate(bases)))
    return path


@pytest.fixture(scope="module")
def told(contigs: Path, tiny_model: Path, nucleotides: Path) -> dict[str, Any]:
    """The options of a run, all but its output."""
    return {
        "inputs": str(contigs), "model": str(tiny_model), "device": "cpu", "from_": "contigs", "genes": "virnucpro",
        "chunk": 300, "nucleotide": True, "nucleotide_model": str(nucleotides), "token_budget": 1024,
    }  # fmt: skip


@pytest.fixture
def embed(tmp_path: Path, told: dict[str, Any]) -> Embed:
    def run(output: str = "out.h5", **options: Any) -> Path:
        embed_fasta(output=tmp_path / output, **told | options)
        return tmp_path / output

    return run


@pytest.fixture(scope="module")
def whole(told: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an uninterrupted run, to read and to compare others with."""
    output = tmp_path_factory.mktemp("whole") / "out.h5"
    embed_fasta(output=output, **told)
    return output


# --- slices ----------------------------------------------------------------------------------------------------------


def frames(contig: str, size: int) -> list[tuple[str, str, str]]:
    """(name, bases, residues) of each frame that VirNucPro keeps, written anew from its description."""
    n, kept = len(contig), []
    count = -(-n // size)
    each, rest = divmod(count * size - n, max(count, 1))
    for number in range(count):
        start = number * (size - each) - min(number, each + rest)
        chunk = contig[start : start + size]
        back = "".join({"A": "T", "C": "G", "G": "C", "T": "A"}.get(base, base) for base in reversed(chunk))
        for letter, strand in (("F", chunk), ("R", back)):
            for frame in range(3):
                residues = ""
                for at in range(frame, len(strand) - 2, 3):
                    codon = [CODONS.get(base, 64) for base in strand[at : at + 3]]
                    if max(codon) < 4:
                        residues += AMINO[16 * codon[0] + 4 * codon[1] + codon[2]]
                if residues and "*" not in residues:
                    bases = strand[frame : frame + 3 * len(residues) + 1]
                    kept.append((f"c_chunk_{number + 1}{letter}{frame + 1}", bases, residues))
    return kept


def without_stops(generator: random.Random, length: int, odd: str = "") -> str:
    """Bases of a contig, most of whose chunks have a frame without a stop; some are odd letters."""
    codons = [a + b + c for a in "TCAG" for b in "TCAG" for c in "TCAG" if a + b + c not in ("TAA", "TAG", "TGA")]
    bases = "".join(generator.choices(codons, k=length // 3 + 1))[:length]
    return "".join(generator.choice(odd) if odd and generator.random() < 0.02 else base for base in bases)


@pytest.mark.parametrize("size", [300, 500])
@pytest.mark.parametrize("odd", ["", "N", "NRYKMSWBDHV-"])
def test_slices_are_those_of_virnucpros_own_steps(size: int, odd: str) -> None:
    generator = random.Random(1)
    find = chunks.Caller(
        genes.EmbedConfig(("c",), "o.h5", from_="contigs", genes="virnucpro", chunk=size, nucleotide=True)
    )
    found = 0
    for length in [*range(0, 12), *range(size - 3, size + 4), *(generator.randrange(8 * size) for _ in range(40))]:
        contig = without_stops(generator, length, odd)
        expected = frames(contig, size)
        found += len(expected)
        for text, column in ((find("c", contig.encode()).slices, 1), (find("c", contig.encode()).text, 2)):
            lines = text.decode().splitlines()
            assert [(line[1:].split()[0]) for line in lines[::2]] == [frame[0] for frame in expected]
            assert lines[1::2] == [frame[column] for frame in expected]
    assert found > 100


def test_an_n_makes_a_slice_end_early() -> None:
    """By hand: GCANGCAGCAGC reads A, S, S, whose slice has 10 bases, although the codons cover 12."""
    config = genes.EmbedConfig(("c",), "o.h5", from_="contigs", genes="virnucpro", nucleotide=True)
    found = chunks.Caller(config)("c", b"GCANGCAGCAGC").slices.decode().splitlines()
    named = dict(zip((line.split()[0] for line in found[::2]), found[1::2], strict=True))
    assert named[">c_chunk_1F1"] == "GCANGCAGCA"
    assert named[">c_chunk_1R1"] == "GCTGCTGCNT"


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(path: Path) -> np.ndarray:
    with read_embeddings(path) as file:
        half = file.half("dna")
        assert (half.status == store.DONE).all()
        return np.array(half.array(half.names[-1]))


def test_rows_are_those_of_the_slices_by_themselves(whole: Path, tmp_path: Path, nucleotides: Path) -> None:
    slices, proteins = (whole.parent / f"out.{name}" for name in ("slices.fna", "proteins.faa"))
    assert [name for name, _ in read_fasta(slices)] == [name for name, _ in read_fasta(proteins)]
    embed_fasta(
        slices, tmp_path / "alone.h5", model=str(nucleotides), kind="nucleotide", pool=("mean-all",), device="cpu"
    )
    with read_embeddings(tmp_path / "alone.h5") as alone, read_embeddings(whole) as file:
        assert alone.names == file.names
        assert (rows(whole) == alone[:]).all()
        assert (
            file.half("dna").names == ["mean-all/4"]
            and file.settings["dna"]["weights_sha256"] == alone.settings["weights_sha256"]
        )


def test_proteins_are_as_without_them(embed: Embed, whole: Path) -> None:
    both, alone = contents(whole), contents(embed("alone.h5", nucleotide=False, nucleotide_model="dnabert-s"))
    assert {name: each for name, each in both.items() if not name.startswith("dna/")} == alone


def test_workers_and_shards_give_the_same_file(embed: Embed, whole: Path, tmp_path: Path) -> None:
    expected = contents(whole)
    assert contents(embed("workers.h5", workers=2)) == expected
    for shard in ("1/3", "2/3", "3/3"):
        embed("parts.h5", shard=shard)
    merge.merge_shards(str(tmp_path / "parts.h5"))
    merged = contents(tmp_path / "parts.h5")
    assert merged == expected
    assert verify.verify_file(str(tmp_path / "parts.h5"), ())


def test_rows_come_from_the_cache(embed: Embed, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    expected = contents(embed("first.h5", cache=cache))
    embed_fasta_report = tmp_path / "again.json"
    again = embed("again.h5", cache=cache, report=str(embed_fasta_report))
    counts = json.loads(embed_fasta_report.read_text())["counts"]
    assert (
        counts["dna: computed"] == 0
        and counts["dna: from the cache"] > 0
        and (rows(again) == rows(tmp_path / "first.h5")).all()
    )
    found = contents(again)
    assert {name for name in found if found[name] != expected[name]} == {"flags", "dna/flags", "dna/sums"}


def test_groups_have_rows_of_both_halves(embed: Embed, tmp_path: Path) -> None:
    output = embed(group="contig")
    with read_embeddings(output) as file:
        half, of = file.half("dna"), file.groups.of
        for group, members in enumerate(file.groups.members):
            row, there = half.at("groups/mean/4")[group], rows(output)[of == group].astype(np.float64)
            assert np.isnan(row).all() if not members else (row == there.mean(axis=0).astype(np.float16)).all()
    for shard in ("1/2", "2/2"):
        embed("parts.h5", group="contig", shard=shard)
    merge.merge_shards(str(tmp_path / "parts.h5"))
    assert contents(tmp_path / "parts.h5") == contents(output)


def test_virnucpros_files_have_both_halves(whole: Path, tmp_path: Path) -> None:
    export.export_file(str(whole), "virnucpro", str(tmp_path / "files"))
    with read_embeddings(whole) as file:
        merged = torch.load(tmp_path / "files" / "output_0_merged.pt", weights_only=True)
        assert merged["ids"] == file.names
        assert (merged["data"].numpy() == np.concatenate([rows(whole), file[:]], axis=1).astype(np.float32)).all()
        found = torch.load(tmp_path / "files" / "output_0_DNABERT_S.pt", weights_only=True)
        assert found["nucleotide"] == file.names == [each["label"] for each in found["data"]]
        assert (np.array([each["mean_representation"] for each in found["data"]], np.float32) == rows(whole)).all()
    proteins = torch.load(tmp_path / "files" / "output_0_ESM.pt", weights_only=True)
    assert list(proteins) == ["proteins", "data"]


# --- kills and damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "survived"),
    [("fsync", 0), ("replace", 0), ("replace", 1), ("replace", 2), ("rename", 0), ("pwrite", 60), ("fdatasync", 2),
     ("fdatasync", 9), ("fdatasync", 13), ("rename_exclusive", 0)],
)  # fmt: skip
def test_a_kill_at_any_step_is_made_good_by_the_same_command(
    embed: Embed, told: dict[str, Any], whole: Path, tmp_path: Path, call: str, survived: int
) -> None:
    output = tmp_path / "out.h5"
    process = CHILDREN.Process(target=child, args=(told | {"output": str(output)}, (call, survived)))
    process.start()
    process.join(100)
    assert process.exitcode == -9 and not output.exists()
    assert contents(embed()) == contents(whole)
    assert {path.name for path in tmp_path.glob("out*")} == {
        "out.h5",
        "out.proteins.faa",
        "out.proteins.npz",
        "out.slices.fna",
    }


def test_a_run_that_goes_on_computes_what_is_pending(embed: Embed, whole: Path, tmp_path: Path) -> None:
    stopped_in_the_half(embed)
    report = tmp_path / "report.json"
    assert contents(embed(report=str(report))) == contents(whole)
    counts = json.loads(report.read_text())["counts"]
    assert 0 < counts["dna: computed"] < counts["proteins"]


def test_rows_that_are_not_as_they_were_committed_are_computed_again(embed: Embed, whole: Path, tmp_path: Path) -> None:
    stopped_in_the_half(embed)
    partial = tmp_path / "out.h5.partial"
    with h5py.File(partial, "r+") as file:
        row = int(np.flatnonzero(file["dna/status"][:] == store.DONE)[0])
        file["dna/mean-all/4"][row] = 1
    report = tmp_path / "report.json"
    assert contents(embed(report=str(report))) == contents(whole)
    assert "1 protein not in" in str(json.loads(report.read_text())["notes"])


def test_verify_and_merge_see_a_changed_row(embed: Embed, tmp_path: Path) -> None:
    for shard in ("1/2", "2/2"):
        embed("parts.h5", shard=shard)
    part = tmp_path / "parts.shard-0002-of-0002.h5"
    with h5py.File(part, "r+") as file:
        file["dna/mean-all/4"][0] = 1
    with pytest.raises(UserError, match="damaged"):
        merge.merge_shards(str(tmp_path / "parts.h5"))
    assert not list(tmp_path.glob("parts.h5*"))
    with h5py.File(part, "r+") as file:
        file["dna/mean-all/4"][0] = np.nan
    with pytest.raises(UserError, match="damaged"):
        merge.merge_shards(str(tmp_path / "parts.h5"))


def test_slices_that_cannot_be_embedded_are_told_and_tried_again(embed: Embed, whole: Path, tmp_path: Path) -> None:
    """There is no memory for the slices, in any way; the proteins are there all the same."""
    told, real = tmp_path / "report.json", placer.Placer.place

    def place(self: Any, rows: Any) -> None:
        if self.file.half:
            self.unfit += self.segments.record[rows.segments].tolist()
        else:
            real(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placer.Placer, "place", place)
        patch.setattr(second_pass, "parameters", lambda spec: 1 << 60)
        embed(report=str(told))
    report = json.loads(told.read_text())
    with read_embeddings(tmp_path / "out.h5") as file:
        half = file.half("dna")
        assert (half.status == store.SKIPPED).all() and (half.reason == store.NO_MEMORY).all()
        assert np.isnan(half.array("mean-all/4")).all() and (file.status == store.DONE).all()
        assert report["counts"]["slices left out"] == len(file)
    assert contents(embed(retry_skipped=True)) == contents(whole)


def test_what_cannot_be_is_refused(embed: Embed, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--nucleotide is of --genes virnucpro"):
        embed(genes="six-frame", chunk=500)
    with pytest.raises(UserError, match="--nucleotide is of contigs"):
        embed(from_="proteins", genes="pyrodigal-gv", chunk=500)
    with pytest.raises(UserError, match="--nucleotide-model is of --nucleotide"):
        embed(nucleotide=False)
    output = embed()
    with pytest.raises(UserError, match="dna: "):
        embed(nucleotide=False, nucleotide_model="dnabert-s")
    output.unlink()
    slices = tmp_path / "out.slices.fna"
    whole = slices.read_text()
    slices.unlink()
    embed()  # proteins of a run without --nucleotide are no hindrance
    assert slices.read_text() == whole
    output.unlink()
    for changed in (">mine\nACGT\n", whole[:-9]):
        slices.write_text(changed)
        with pytest.raises(UserError, match=r"slices\.fna exists, and is not of these contigs"):
            embed()
        assert slices.read_text() == changed
