"""FASTQ is read as the FASTA of its reads, wherever FASTA is read; what is no FASTQ is refused with read and line."""

import gzip
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from virnucpro_cli import fasta
from virnucpro_cli.alphabet import ESM
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import fastq

READS = b"@r1/1 first\nACGTN\n+\nIIII@\n@r2\n\n+r2\n\n@r3\nTTGA\n+\n@@@@\n"


def table(path: str | Path, folder: Path) -> fasta.RecordTable:
    return fasta.index(fasta.open_sources([str(path)], folder), dedup=False)


def records(path: str | Path, folder: Path) -> list[tuple[str, bytes]]:
    there = table(path, folder)
    return list(zip(there.names(0, len(there)), there.sequences(0, len(there)), strict=True))


EXPECTED = [("r1/1", b"ACGTN"), ("r2", b""), ("r3", b"TTGA")]


@pytest.mark.parametrize(
    "text", [READS, READS.replace(b"\n", b"\r\n"), READS + b"\n\n", READS[:-1], b"\xef\xbb\xbf" + READS]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_reads_are_records(tmp_path: Path, text: bytes, compressed: bool) -> None:
    path = tmp_path / "reads.fastq"
    path.write_bytes(gzip.compress(text) if compressed else text)
    assert records(path, tmp_path) == EXPECTED


def test_a_carriage_return_in_a_header_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "reads.fastq"
    path.write_bytes(READS.replace(b" first", b"\rAAAA"))
    assert records(path, tmp_path) == EXPECTED


def test_reads_come_through_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, into = os.pipe()
    os.write(into, READS)
    os.close(into)
    monkeypatch.setattr(sys, "stdin", os.fdopen(out))
    assert records("-", tmp_path) == EXPECTED


def test_many_blocks_of_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastq, "BLOCK_BYTES", 50)
    monkeypatch.setattr(fasta.reading, "READ_BYTES", 7)
    (tmp_path / "reads.fq").write_bytes(b"".join(b"@r%d\nACGT\n+\nIIII\n" % i for i in range(500)))
    assert records(tmp_path / "reads.fq", tmp_path) == [(f"r{i}", b"ACGT") for i in range(500)]


def test_fasta_and_fastq_go_together(tmp_path: Path) -> None:
    (tmp_path / "a.fq").write_bytes(READS)
    (tmp_path / "b.fna").write_bytes(b">c\nGG\nAA\n")
    sources = fasta.open_sources([str(tmp_path / "b.fna"), str(tmp_path / "a.fq")], tmp_path)
    there = fasta.index(sources, dedup=False)
    assert there.names(0, 4) == ["c", "r1/1", "r2", "r3"] and there.length.tolist() == [4, 5, 0, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"@a\nACGT\n+\nIIII\n@b\nACGT\n+\nIII\n", "read 2, line 8 has 3 qualities for 4 bases"),
        (b"@a\nAC\nGT\n+\nIIII\n", r"read 1, line 3 does not begin with \+"),
        (b"@a\nACGT\n+\nIIII\nb\nACGT\n+\nIIII\n", "read 2, line 5 does not begin with @"),
        (b"@a\nAC GT\n+\nIIIII\n", "read 1, line 2 holds ' '"),
        (b"@a\nACGT\n+\n", "read 1, line 4 has 0 qualities"),
        (b"@a\nACGT\n+\nIIII\n@b\n", "read 2, line 7 does not begin"),
        (b"@HD\tVN:1.6\n@SQ\tSN:x\tLN:3\n", "is SAM"),
    ],
)
def test_what_is_no_read_of_four_lines_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "reads.fq").write_bytes(text)
    with pytest.raises(UserError, match=words) as caught:
        table(tmp_path / "reads.fq", tmp_path)
    assert "reads.fq" in caught.value.what and caught.value.remedy


def test_a_large_fastq_has_a_kept_index_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from virnucpro_cli.fasta import indexing, kept

    monkeypatch.setattr(indexing, "WORTH_BYTES", 1)
    (tmp_path / "reads.fq").write_bytes(READS)
    said: list[str] = []
    seen: list[Any] = []
    for _ in range(2):
        with kept.Kept(tmp_path / "out.h5.index", said.append) as inputs:
            sources = inputs.sources([str(tmp_path / "reads.fq")], tmp_path)
            there = inputs.table(sources, fasta.How("x", "keep", ESM), dedup=False)
            seen.append((there.names(0, 3), list(there.sequences(0, 3)), sources[0].spool.name))
    assert seen[0][:2] == seen[1][:2] == (["r1/1", "r2", "r3"], [b"ACGTN", b"", b"TTGA"])
    assert str(seen[1][2]).endswith("out.h5.index") and said == []


def test_blocks_are_read_as_they_come() -> None:
    text = b"".join(fastq.as_fasta(iter([bytes([each]) for each in READS]), "x"))
    assert text == b">r1/1 first\nACGTN\n>r2\n\n>r3\nTTGA\n" and io.BytesIO(text)
