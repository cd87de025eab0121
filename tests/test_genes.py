"""From contigs: proteins and where they lie, by each caller; and the run that embeds them."""

import gzip
import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyrodigal_gv
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from children import CHILDREN, Child, program, until
from conftest import ROOT, read_fasta
from test_faults import child, one_thread  # noqa: F401  (one_thread is in force here too)
from virnucpro_cli import report, store
from virnucpro_cli.cluster import merge
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.explore import inspect
from virnucpro_cli.features import contigs as genes
from virnucpro_cli.features.contigs import chunks, codons, six_frame
from virnucpro_cli.features.contigs.codons import Genes
from virnucpro_cli.model import locate
from virnucpro_cli.plan import shards
from virnucpro_cli.validation import verify

CONTIGS = ROOT / "examples" / "contigs.fna"
CODE = {
    "F": "TTT TTC", "L": "TTA TTG CTT CTC CTA CTG", "I": "ATT ATC ATA", "M": "ATG", "V": "GTT GTC GTA GTG",
    "S": "TCT TCC TCA TCG AGT AGC", "P": "CCT CCC CCA CCG", "T": "ACT ACC ACA ACG", "A": "GCT GCC GCA GCG",
    "Y": "TAT TAC", "*": "TAA TAG TGA", "H": "CAT CAC", "Q": "CAA CAG", "N": "AAT AAC", "K": "AAA AAG",
    "D": "GAT GAC", "E": "GAA GAG", "C": "TGT TGC", "W": "TGG", "R": "CGT CGC CGA CGG AGA AGG", "G": "GGT GGC GGA GGG",
}  # fmt: skip
RESIDUE = {codon: residue for residue, all_of_it in CODE.items() for codon in all_of_it.split()}
DNA = st.text("ACGT", max_size=120) | st.text("ACGTN", max_size=120) | st.text("TAGN", max_size=200)
GAPPED = st.lists(st.text("ACGTN", max_size=40) | st.integers(45, 70).map("N".__mul__), max_size=5).map("".join)

Record = tuple[str, str, int, int, int]  # name, residues, begin, end, strand


def config(**options: Any) -> EmbedConfig:
    return EmbedConfig(("contigs.fna",), "out.h5", from_="contigs", **options)


def records(found: Genes) -> list[Record]:
    """What a caller found, from its FASTA text; its columns must say the same as its headers."""
    listed: list[Record] = []
    for text in found.text.decode().split(">")[1:]:
        header, *lines = text.splitlines()
        name, begin, end, strand, *_ = header.split(" # ")
        listed.append((name, "".join(lines), int(begin), int(end), int(strand)))
    assert [r[2] for r in listed] == found.begin.tolist() and [r[3] for r in listed] == found.end.tolist()
    assert [r[4] for r in listed] == found.strand.tolist()
    return listed


def reversed_complement(dna: str) -> str:
    return "".join({"A": "T", "C": "G", "G": "C", "T": "A"}.get(base, "N") for base in reversed(dna))


def of_strand(dna: str, begin: int, end: int, strand: int) -> str:
    """The bases that coordinates name, in reading direction."""
    return dna[begin - 1 : end] if strand > 0 else reversed_complement(dna[begin - 1 : end])


def codons_of(dna: str) -> list[str]:
    return [dna[i : i + 3] for i in range(0, len(dna) - 2, 3)]


# --- translation -----------------------------------------------------------------------------------------------------


def test_the_table_is_the_standard_genetic_code() -> None:
    assert len(RESIDUE) == 64
    for codon, residue in RESIDUE.items():
        assert codons.residues_at(codon.encode()).tobytes() == residue.encode()
    for odd in ("NTG", "ANG", "ATN", "RTG", "A-G"):
        assert codons.residues_at(odd.encode()).tobytes() == b"X"


# --- six frames ------------------------------------------------------------------------------------------------------


def naive_six_frames(name: str, dna: str, least: int) -> list[Record]:
    listed = []
    for letter, strand, text in (("F", 1, dna), ("R", -1, reversed_complement(dna))):
        gaps = [(found.start(), found.end()) for found in re.finditer("N{50,}", text)]
        for frame in range(3):
            orf, begin, at = "", frame, frame
            for codon in [*codons_of(text[frame:]), "TAA"]:
                cut = any(start < at + 3 and at < stop for start, stop in gaps)
                residue = "*" if cut else RESIDUE.get(codon, "X")
                if residue != "*":
                    orf += residue
                else:
                    if len(orf) - orf.count("X") >= least:
                        a, b = (begin + 1, at) if strand > 0 else (len(dna) - at + 1, len(dna) - begin)
                        listed.append((f"{name}_{letter}{frame + 1}_{a}_{b}", orf, a, b, strand))
                    orf, begin = "", at + 3
                at += 3
    return listed


@settings(max_examples=300)
@given(DNA | GAPPED, st.integers(1, 12))
@example("", 1)
@example("AT", 1)
@example("TAATAA", 1)
@example("NNNNNNNNNNNN", 1)
def test_six_frames_are_a_plain_readers_orfs(dna: str, least: int) -> None:
    found = records(six_frame.Caller(config(genes="six-frame", min_aa=least))("c", dna.encode()))
    assert found == naive_six_frames("c", dna, least)
    for _, residues, begin, end, strand in found:
        assert "".join(RESIDUE.get(codon, "X") for codon in codons_of(of_strand(dna, begin, end, strand))) == residues


def test_an_orf_begins_and_ends_at_stops_or_at_the_contigs_ends() -> None:
    dna = "ATGAAATAACCCGGGTTTTGAGC"  # F1: MK*PGF* and GC that is no codon
    found = records(six_frame.Caller(config(genes="six-frame", min_aa=2))("c", dna.encode()))
    assert found[:2] == [("c_F1_1_6", "MK", 1, 6, 1), ("c_F1_10_18", "PGF", 10, 18, 1)]
    assert ("c_R1_1_23"[:4], 3, 23) in [(name[:4], begin, end) for name, _, begin, end, _ in found]


# --- VirNucPro's chunks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [
        (0, 500, []),
        (1, 500, [(0, 1)]),
        (499, 500, [(0, 499)]),  # one chunk of all there is
        (500, 500, [(0, 500)]),
        (501, 500, [(0, 500), (250, 501)]),  # the excess of 499 over two: 249, and one of the 250 that are left
        (999, 500, [(0, 500), (499, 999)]),
        (1000, 500, [(0, 500), (500, 1000)]),
        (1001, 500, [(0, 500), (333, 833), (666, 1001)]),  # 499 over three: 166, and one more for both
        (1499, 500, [(0, 500), (499, 999), (999, 1499)]),  # 1 over three: 0, and 1 for the first
        (1998, 500, [(0, 500), (499, 999), (998, 1498), (1498, 1998)]),  # 2 over four: 0, and 1 for the first two
        (301, 300, [(0, 300), (150, 301)]),
        (700, 300, [(0, 300), (233, 533), (466, 700)]),  # 200 over three: 66, and one more for both
    ],
)
def test_chunks_worked_out_by_hand(n: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert chunks.chunks(n, size) == expected


@given(st.integers(1, 20_000), st.sampled_from([300, 500]))
def test_chunks_cover_the_contig_with_overlaps_that_differ_by_one_base_at_most(n: int, size: int) -> None:
    found = chunks.chunks(n, size)
    assert len(found) == -(-n // size) and found[0][0] == 0 and found[-1][1] == n
    *others, (last, _) = found
    assert all(stop - start == size for start, stop in others) and 0 < n - last <= size
    overlaps = [before[1] - after[0] for before, after in pairwise(found)]
    excess = len(found) * size - n
    assert (
        (sum(overlaps) == excess or overlaps == [excess // len(found) + 1] * len(overlaps)) if overlaps else n <= size
    )
    assert overlaps == sorted(overlaps, reverse=True) and (not overlaps or overlaps[0] - overlaps[-1] <= 1)


def naive_chunks(name: str, dna: str, size: int) -> list[Record]:
    """The description, base by base: what each chunk takes back is its overlap, larger by one while there are bases left."""
    count = -(-len(dna) // size)
    excess, position, listed = count * size - len(dna), 0, []
    left = excess - excess // max(count, 1) * (count - 1)
    for k in range(count):
        if k:
            position += size - excess // count - (left > 0)
            left -= 1
        chunk = dna[position : position + size]
        for letter, strand, text in (("F", 1, chunk), ("R", -1, reversed_complement(chunk))):
            for frame in range(3):
                read = codons_of(text[frame:])
                residues = "".join(RESIDUE.get(codon, "") for codon in read)
                if residues and "*" not in residues:
                    first, last = frame, frame + 3 * len(read)
                    if strand < 0:
                        first, last = len(chunk) - last, len(chunk) - first
                    begin, end = position + first + 1, position + last
                    listed.append((f"{name}_chunk_{k + 1}{letter}{frame + 1}", residues, begin, end, strand))
    return listed


@settings(max_examples=300)
@given(st.text("ACGGC", max_size=200) | st.text("ACGTNCG", max_size=90) | DNA, st.integers(3, 40))
@example("", 3)
@example("AT", 3)
@example("NNN", 3)
def test_chunks_are_translated_as_described(dna: str, size: int) -> None:
    caller = chunks.Caller(config(genes="virnucpro"))
    caller._size = size  # small, so that there are many
    assert records(caller("c", dna.encode())) == naive_chunks("c", dna, size)


@pytest.mark.parametrize("n", [299, 300, 301, 599, 600, 601, 1500])
def test_chunks_of_the_true_size_too(n: int) -> None:
    dna = "".join(random.Random(n).choices("ACGC", k=n))
    found = records(chunks.Caller(config(genes="virnucpro", chunk=300))("seq", dna.encode()))
    assert found == naive_chunks("seq", dna, 300) and found[0][0] == "seq_chunk_1F1" and found[-1][0].endswith("R3")


def test_a_frame_worked_out_by_hand() -> None:
    #      F1 ATG GCN AAA CC    -> M K, the ambiguous codon yields nothing
    #      F2 TGG CNA AAC C     -> W N
    #      F3 GGC NAA ACC       -> G T
    #      reverse complement GGT TTN GCC AT: R1 G A; R2 GTT TNG CCA -> V P; R3 TTT NGC CAT -> F H
    found = records(chunks.Caller(config(genes="virnucpro"))("seq", b"ATGGCNAAACC"))
    assert found == [
        ("seq_chunk_1F1", "MK", 1, 9, 1), ("seq_chunk_1F2", "WN", 2, 10, 1), ("seq_chunk_1F3", "GT", 3, 11, 1),
        ("seq_chunk_1R1", "GA", 3, 11, -1), ("seq_chunk_1R2", "VP", 2, 10, -1), ("seq_chunk_1R3", "FH", 1, 9, -1),
    ]  # fmt: skip
    found = records(chunks.Caller(config(genes="virnucpro"))("seq", b"ATGTAA"))  # M* is dropped, last codon or not
    assert [r[:2] for r in found] == [
        ("seq_chunk_1F2", "C"), ("seq_chunk_1F3", "V"), ("seq_chunk_1R1", "LH"), ("seq_chunk_1R2", "Y"), ("seq_chunk_1R3", "T"),
    ]  # fmt: skip


# --- pyrodigal-gv ----------------------------------------------------------------------------------------------------


def test_genes_are_those_of_the_librarys_own_writer(tmp_path: Path, embed_contigs: Callable[..., Path]) -> None:
    output = embed_contigs(CONTIGS)
    finder = pyrodigal_gv.ViralGeneFinder(meta=True, mask=True)
    with open(tmp_path / "theirs.faa", "w") as file:
        found = [finder.find_genes(dna.encode()) for _, dna in read_fasta(CONTIGS)]
        for (name, _), of_contig in zip(read_fasta(CONTIGS), found, strict=True):
            of_contig.write_translations(file, name, full_id=True)
    assert (tmp_path / "out.proteins.faa").read_text() == (tmp_path / "theirs.faa").read_text()
    with store.read_embeddings(output) as file:
        assert file.names == [
            f"{name}_{i + 1}"
            for (name, _), of_contig in zip(read_fasta(CONTIGS), found, strict=True)
            for i in range(len(of_contig))
        ]
        expected = [(c, g.begin, g.end, g.strand) for c, of_contig in enumerate(found) for g in of_contig]
        columns = file.columns
        names = ("genes/contig", "genes/begin", "genes/end", "genes/strand")
        assert list(zip(*(columns[name].tolist() for name in names), strict=True)) == expected
        assert [columns[name].dtype for name in names] == [np.int64, np.int64, np.int64, np.int8]
        assert file.tables["contigs/ids"].asstr()[:].tolist() == [name for name, _ in read_fasta(CONTIGS)]
        assert file.tables["contigs/lengths"][:].tolist() == [len(dna) for _, dna in read_fasta(CONTIGS)]


def test_coordinates_of_genes_translate_to_the_proteins_both_strands(embed_contigs: Callable[..., Path]) -> None:
    output = embed_contigs(CONTIGS)
    dna = [text for _, text in read_fasta(CONTIGS)]
    proteins = [text for _, text in read_fasta(genes.paths_of(output).proteins)]
    with store.read_embeddings(output) as file:
        columns = [file.columns[f"genes/{name}"].tolist() for name in ("contig", "begin", "end", "strand")]
        assert set(columns[3]) == {1, -1}
    for residues, contig, begin, end, strand in zip(proteins, *columns, strict=True):
        read = "".join(RESIDUE[codon] for codon in codons_of(of_strand(dna[contig], begin, end, strand)))
        assert read[1:] == residues[1:]  # the first may be another start codon's M


def test_the_order_of_contigs_is_kept_whatever_thread_is_first(tmp_path: Path) -> None:
    class Slow:
        def __call__(self, name: str, sequence: bytes) -> Genes:
            time.sleep(0.02 * random.Random(name).random())
            return Genes.of(f">{name}\n".encode(), [(1, 3, 1)])

    path = tmp_path / "many.fna"
    path.write_text("".join(f">c{i}\nACGT\n" for i in range(60)))
    contigs = genes.fasta.index(genes.fasta.open_sources([str(path)], tmp_path), dedup=False)
    found = [each.text.decode() for each, _ in genes._called(contigs, Slow())]
    assert found == [f">c{i}\n" for i in range(60)]


def test_no_gene_lies_in_or_across_a_run_of_n_and_the_real_ones_are_found(
    embed_contigs: Callable[..., Path], tmp_path: Path
) -> None:
    (_, dna), *_ = read_fasta(CONTIGS)
    (tmp_path / "in.fna").write_text(f">plain\n{dna}\n>only\n{'N' * 500}\n>between\n{dna}{'n' * 3000}{dna}\n")
    for caller in ({}, {"genes": "six-frame", "min_aa": 50}):
        output = tmp_path / f"{caller.get('genes', 'gv')}.h5"
        embed_contigs(tmp_path / "in.fna", output=output, group="contig", **caller)
        proteins = read_fasta(genes.paths_of(output).proteins)
        assert all("XX" not in residues for _, residues in proteins)
        with store.read_embeddings(output) as file:
            of = file.columns["genes/contig"]
            begin, end = file.columns["genes/begin"][of == 2], file.columns["genes/end"][of == 2]
            assert len(begin) == 2 * (of == 0).sum() and not (of == 1).any()
            assert ((end <= len(dna)) | (begin > len(dna) + 3000)).all()
            assert file.tables["contigs/gaps"][:].tolist() == [0, 500, 3000]
            counts = file.report["counts"]
            assert (counts["contigs with gaps"], counts["bases in gaps"]) == (2, 3500)
            assert any(
                "2 of 3 contigs with gaps (50 or more N in a row), 3,500 bases" in note for note in file.report["notes"]
            )


def test_virnucpros_frames_join_what_lies_on_both_sides_of_a_run_of_n(
    embed_contigs: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "in.fna").write_text(f">c\n{'GCAAGC' * 10}{'N' * 60}{'GCAAGC' * 10}\n")
    output = embed_contigs(tmp_path / "in.fna", genes="virnucpro")
    assert dict(read_fasta(genes.paths_of(output).proteins))["c_chunk_1F1"] == "AS" * 20
    with store.read_embeddings(output) as file:
        assert any("joined, as by VirNucPro's own program" in note for note in file.report["notes"])


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def embed_contigs(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    def main(path: Path | str, **options: Any) -> Path:
        given = {
            "output": tmp_path / "out.h5",
            "model": str(tiny_model),
            "device": "cpu",
            "from_": "contigs",
            **options,
        }
        embed_fasta(path, **given)
        return Path(given["output"])

    return main


@pytest.mark.parametrize("caller", [{}, {"genes": "six-frame", "min_aa": 20}, {"genes": "virnucpro", "chunk": 300}])
def test_the_proteins_lie_beside_the_output_and_are_embedded_as_any_others(
    embed_contigs: Callable[..., Path], tmp_path: Path, tiny_model: Path, caller: dict[str, Any]
) -> None:
    output = embed_contigs(CONTIGS, pool=("mean", "residue"), **caller)
    proteins = tmp_path / "out.proteins.faa"
    embed_fasta(proteins, tmp_path / "plain.h5", model=str(tiny_model), device="cpu", pool=("mean", "residue"))
    with store.read_embeddings(output) as file, store.read_embeddings(tmp_path / "plain.h5") as plain:
        assert file.complete and file.names == plain.names and np.array_equal(file[:], plain[:])
        assert json.loads(file.attributes["inputs"])[0]["path"] == str(proteins)
        assert json.loads(file.attributes["contigs"])[0]["path"] == str(CONTIGS)
        assert json.loads(file.attributes["gene_caller"])["name"] == caller.get("genes", "pyrodigal-gv")
        for name, values in caller.items():
            assert json.loads(file.attributes["gene_caller"])[name.replace("genes", "name")] == values
        assert file.report["counts"]["contigs"] == 4
        without = 4 - len(np.unique(file.columns["genes/contig"]))
        assert file.report["counts"]["contigs without proteins"] == without
    assert verify.verify_file(str(output)).passed
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.h5", "out.proteins.faa", "out.proteins.npz"]


def test_text_is_read_as_nucleotides_are_written(embed_contigs: Callable[..., Path], tmp_path: Path) -> None:
    plain = embed_contigs(CONTIGS)
    text = CONTIGS.read_text()
    rna = "".join(
        line if line.startswith(">") else line.lower().replace("t", "u") for line in text.splitlines(keepends=True)
    )
    with gzip.open(tmp_path / "rna.fna.gz", "wt") as file:
        file.write(rna.replace("\n", "\r\n"))
    other = embed_contigs(tmp_path / "rna.fna.gz", output=tmp_path / "rna.h5")
    assert genes.paths_of(other).proteins.read_bytes() == genes.paths_of(plain).proteins.read_bytes()


class Counting:
    """How often genes are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls, real = 0, genes._make

        def counted(*arguments: Any) -> Any:
            self.calls += 1
            return real(*arguments)

        monkeypatch.setattr(genes, "_make", counted)


def test_proteins_that_are_there_are_used_only_if_they_are_certainly_the_same(
    embed_contigs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Counting(monkeypatch)
    output = embed_contigs(CONTIGS)
    proteins, table = tmp_path / "out.proteins.faa", tmp_path / "out.proteins.npz"
    embed_contigs(CONTIGS)
    assert made.calls == 1, "complete already"
    with store.read_embeddings(output) as file:
        columns = file.columns
    output.unlink()
    embed_contigs(CONTIGS)
    assert made.calls == 1
    with store.read_embeddings(output) as file:
        assert all(np.array_equal(values, columns[name]) for name, values in file.columns.items())

    proteins.unlink()  # a kill between the table and the proteins leaves the table alone
    embed_contigs(CONTIGS)
    assert made.calls == 2

    output.unlink()
    whole = proteins.read_text()
    for changed in (whole[:-9], whole.replace("contig_1_1 ", "renamed ")):
        proteins.write_text(changed)
        with pytest.raises(UserError, match="not of these contigs and settings"):
            embed_contigs(CONTIGS)
        assert proteins.read_text() == changed
    embed_contigs(CONTIGS, overwrite=True)
    assert made.calls == 3 and proteins.read_text() == whole

    (tmp_path / "more.fna").write_text(CONTIGS.read_text() + ">more\nACGT\n")
    for contigs, options in ((tmp_path / "more.fna", {}), (CONTIGS, {"genes": "six-frame"})):
        with pytest.raises(UserError, match="not of these contigs and settings"):
            embed_contigs(contigs, **options)
    monkeypatch.setattr(genes.pyrodigal_gv, "settings", lambda _: {"version": "another"})
    with pytest.raises(UserError, match="not of these contigs and settings"):
        embed_contigs(CONTIGS)
    monkeypatch.undo()

    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(UserError, match="not of these contigs and settings"):
        embed_contigs(CONTIGS)
    assert verify.verify_file(str(output)).passed


def test_files_of_others_are_left_alone(embed_contigs: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("out.proteins.faa", "out.proteins.npz"):
        (tmp_path / name).write_text("mine\n")
        with pytest.raises(UserError, match=f"{name} exists"):
            embed_contigs(CONTIGS)
        with pytest.raises(UserError, match=f"{name} exists"):
            embed_contigs(CONTIGS, dry_run=True, overwrite=True)
        assert (tmp_path / name).read_text() == "mine\n"
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="too long"):
        embed_contigs(CONTIGS, output=tmp_path / f"{'x' * 240}.h5")
    (tmp_path / "out.proteins.faa").write_bytes(CONTIGS.read_bytes())
    with pytest.raises(UserError, match="is an input"):
        embed_contigs(tmp_path / "out.proteins.faa", overwrite=True)
    with pytest.raises(UserError, match="would overwrite"):
        embed_contigs(CONTIGS, qc=str(tmp_path / "out.proteins.faa"))


def test_a_run_with_other_settings_is_another_run(embed_contigs: Callable[..., Path], tmp_path: Path) -> None:
    embed_contigs(CONTIGS, genes="six-frame")
    for path in tmp_path.glob("out.proteins.*"):
        path.unlink()
    with pytest.raises(UserError, match="gene_caller"):
        embed_contigs(CONTIGS)


@pytest.mark.parametrize(
    ("call", "survived"),
    [("fsync", 0), ("fsync", 1), ("replace", 0), ("replace", 1), ("rename", 0), ("pwrite", 40), ("fdatasync", 3), ("rename_exclusive", 0)],
)  # fmt: skip
def test_a_kill_at_any_step_is_made_good_by_the_same_command(
    embed_contigs: Callable[..., Path], tmp_path: Path, tiny_model: Path, call: str, survived: int
) -> None:
    """Before the table of the proteins, between the two, before the layout, while packs are placed, at the end."""
    options = {"genes": "six-frame", "group": "contig", "token_budget": 1024}
    expected = contents(embed_contigs(CONTIGS, output=tmp_path / "whole.h5", **options))
    output = tmp_path / "out.h5"
    told = {
        "inputs": str(CONTIGS),
        "output": str(output),
        "model": str(tiny_model),
        "device": "cpu",
        "from_": "contigs",
    }
    process = CHILDREN.Process(target=child, args=(told | options, (call, survived)))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and not output.exists()
    assert (tmp_path / "out.proteins.faa").exists() == (call not in ("fsync", "replace"))
    embed_contigs(CONTIGS, **options)
    assert contents(output) == expected
    assert (tmp_path / "out.proteins.faa").read_bytes() == (tmp_path / "whole.proteins.faa").read_bytes()
    assert {path.name for path in tmp_path.glob("out*")} == {"out.h5", "out.proteins.faa", "out.proteins.npz"}


def contents(path: Path) -> dict[str, Any]:
    """Every dataset outside /run: its bytes, or its texts."""
    found: dict[str, Any] = {}

    def keep(name: str, item: Any) -> None:
        if hasattr(item, "dtype") and not name.startswith("run/"):
            values = item[()]
            found[name] = values.tolist() if values.dtype == object else values.tobytes()

    with store.read_embeddings(path) as file:
        file._file.visititems(keep)
        found["names"] = repr(file.names).encode()
    return found


def test_shards_find_the_proteins_once_and_merge_to_the_single_run(
    embed_contigs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(embed_contigs(CONTIGS, output=tmp_path / "one.h5", group="contig", genes="six-frame"))
    made = Counting(monkeypatch)
    output = tmp_path / "out.h5"
    for number in (2, 3, 1):
        embed_contigs(CONTIGS, shard=f"{number}/3", group="contig", genes="six-frame")
    assert made.calls == 1
    with store.read_embeddings(shards.path(output, shards.Shard(2, 3))) as file:
        assert file.groups is not None and len(file.groups.of) == len(file) == len(file.columns["genes/begin"])
        assert file.records is not None and file.records.max() >= len(file)
    merge.merge_shards(str(output))
    assert contents(output) == expected
    with store.read_embeddings(output) as merged, store.read_embeddings(tmp_path / "one.h5") as one:
        for name, data in one.tables.items():
            assert np.array_equal(data[:], merged.tables[name][:])
        assert merged.attributes["gene_caller"] == one.attributes["gene_caller"]
    assert verify.verify_file(str(output)).passed


def find_genes_slowly() -> None:
    """As a run does, in this folder; says when it calls them, and how many there are in the end."""
    make = genes._make

    def slow(*arguments: Any) -> Any:
        print("made", flush=True)
        time.sleep(1)
        return make(*arguments)

    genes._make = slow
    given = EmbedConfig((str(CONTIGS),), "out.h5", from_="contigs")
    sources = genes.fasta.open_sources(given.inputs, Path())
    found = genes.Contigs(given).sources(sources, Path("out.h5"), report.console(), report.Clock())[1]
    print(len(found.columns["genes/contig"]))


def test_of_two_runs_at_once_one_finds_the_proteins(tmp_path: Path) -> None:
    runs = [Child(find_genes_slowly, folder=tmp_path) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    said = [run.out.split() for run in runs]
    assert sorted(map(len, said)) == [1, 1, 2] and {words[-1] for words in said} == {"6"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.proteins.faa", "out.proteins.npz"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (">a\nMKVLAGWEEPLLIF\n", "leave out --from contigs"),
        (">a\n" + "ACGT" * 30 + "\n>b\nACGTLE\n", "Contig 'b' holds 'L'"),
        (">a x\nACGTACGT\n>a y\nACGT\n", "both named 'a'"),
        (">a\nACGT\n>\nACGT\n", "Contig 2 has no name"),
        (">a\nACGT\n>b\n", "No protein was found in the 2 contigs"),
        (">a\n" + "TAATTAGTTAACTAG" * 9 + "\n", "No protein was found"),
        ("@r\nAC\nGT\n+\nIIII\n", "read 1, line 3 does not begin with"),
    ],
)
def test_what_is_no_contig_is_refused_and_nothing_is_left(
    embed_contigs: Callable[..., Path], tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "in.fna").write_text(text)
    with pytest.raises(UserError, match=words):
        embed_contigs(tmp_path / "in.fna", genes="six-frame")
    assert [path.name for path in tmp_path.iterdir()] == ["in.fna"]


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("group_table", None, "list"), ("group_table", "a\n", "list"), ("contacts_for", None, "list"),
        ("inputs", None, "There is no file"), ("inputs", "", "is empty"),
    ],
)  # fmt: skip
def test_all_that_is_read_is_opened_before_the_model_is_fetched_and_genes_are_looked_for(
    embed_contigs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, text: str | None, words: str
) -> None:  # fmt: skip
    def too_early(*_: Any) -> None:
        raise AssertionError("a long step before everything was opened")

    monkeypatch.setattr(genes, "_make", too_early)
    monkeypatch.setattr(genes.fasta, "index", too_early)
    monkeypatch.setattr(locate, "fetch", too_early)
    path = tmp_path / "list"
    if text is not None:
        path.write_text(text)
    options: dict[str, Any] = {option: str(path)} | ({"emit": ("contacts",)} if option == "contacts_for" else {})
    with pytest.raises(UserError, match=words):
        embed_contigs(options.pop("inputs", CONTIGS), **options)


def test_two_files_with_contigs_of_one_name_are_refused(embed_contigs: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "copy.fna").write_bytes(CONTIGS.read_bytes())
    with pytest.raises(UserError, match="Contigs 1 and 5 are both named 'contig_1'"):
        embed_contigs([CONTIGS, tmp_path / "copy.fna"])


def test_contigs_given_as_proteins_are_told_how_to_go_on(embed_contigs: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="--from contigs"):
        embed_contigs(CONTIGS, from_="proteins")


def test_a_missing_library_is_named_with_its_extra(
    embed_contigs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyrodigal_gv", None)
    with pytest.raises(UserError, match=r"pip install 'virnucpro\[contigs\]'"):
        embed_contigs(CONTIGS)
    embed_contigs(CONTIGS, genes="six-frame")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"from_": "reads"}, "--from is 'reads'"), ({"genes": "orfm"}, "--genes is 'orfm'"), ({"chunk": 400}, "--chunk"),
        ({"genes": "six-frame", "min_aa": 0}, "--min-aa is 0"), ({"min_aa": 9}, "--min-aa is of --genes six-frame"),
        ({"genes": "six-frame", "chunk": 300}, "--chunk is of --genes virnucpro"),
        ({"from_": "proteins", "genes": "six-frame"}, "Say --from contigs"),
        ({"from_": "proteins", "min_aa": 9}, "Say --from contigs"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        EmbedConfig(**{"from_": "contigs", **options})


def test_a_config_file_says_from_as_the_option_does(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[embed]\nfrom = "contigs"\ngenes = "six-frame"\nmin_aa = 60\n')
    found = resolve(EmbedConfig, str(tmp_path / "run.toml"), {})
    assert (found.from_, found.genes, found.min_aa) == ("contigs", "six-frame", 60)


def test_a_stop_while_genes_are_found_leaves_nothing(tmp_path: Path, tiny_model: Path) -> None:
    dna = "".join(random.Random(0).choices("ACGT", k=100_000))
    (tmp_path / "in.fna").write_text("".join(f">c{i}\n{dna}\n" for i in range(40)))
    run = program("embed", "in.fna", "-o", "out.h5", "--from", "contigs", "--model", tiny_model, folder=tmp_path)
    until((tmp_path / "out.proteins.faa.virnucpro-new").exists, run)
    run.kill(signal.SIGINT)
    assert run.wait() == 130 and "Traceback" not in run.err and "stopped by SIGINT" in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.fna"]


def test_the_methods_cite_who_predicts_the_genes(embed_contigs: Callable[..., Path]) -> None:
    with store.read_embeddings(embed_contigs(CONTIGS)) as file:
        assert "Larralde (J. Open Source Softw. 7, 4296, 2022)" in inspect.methods(file)
    with store.read_embeddings(embed_contigs(CONTIGS, genes="six-frame", overwrite=True)) as file:
        assert "Larralde" not in inspect.methods(file)
