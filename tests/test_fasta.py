"""The reader on files as they are in the wild: the same table as a plain reader, or an error that names the place."""

import bz2
import gzip
import hashlib
import io
import itertools
import lzma
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyfaidx
import pytest
from esm.data import Alphabet
from hypothesis import given, settings
from hypothesis import strategies as st

from virnucpro_cli import fasta, tables
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import RecordTable
from virnucpro_cli.fasta.reading import PROGRAMS, Source

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

ESM = Alphabet.from_architecture("ESM-1b")
COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}
UNIPROT = Path(__file__).parent / "data" / "uniprot_5k.fasta.gz"
AMINO = "ACDEFGHIKLMNPQRSTVWY"
BOM = b"\xef\xbb\xbf"


def read(*paths: Path, **options: object) -> RecordTable:
    return fasta.index(fasta.open_sources([str(path) for path in paths], paths[0].parent), **options)


@pytest.fixture
def table_of(tmp_path: Path) -> Callable[..., RecordTable]:
    """The record table of a file with this content."""

    def write_and_read(content: bytes, name: str = "in.fasta", **options: object) -> RecordTable:
        (tmp_path / name).write_bytes(content)
        return read(tmp_path / name, **options)

    return write_and_read


@dataclass
class Facts:
    """All that a table says of its records, as plain values."""

    offsets: list[int]
    names: list[str]
    headers: list[str]
    ids: list[list[int]]
    lengths: list[int]
    replaced: list[int]
    unique_of: list[int]


def facts(table: RecordTable) -> Facts:
    n = len(table)
    ids = [list(i) for i in table.token_ids(np.arange(n))]
    for order in (np.arange(n), np.arange(n)[::-1], np.tile(np.arange(n), 40)):  # few: one read each; many: one for all
        if n:
            assert table.tokens(order).tolist() == [token for record in order.tolist() for token in ids[record]]
    return Facts(
        table.offset.tolist(), table.names(0, n), table.names(0, n, full=True), ids,
        table.length.tolist(), table.replaced.tolist(), table.unique_of.tolist(),
    )  # fmt: skip


def plainly(content: bytes) -> Facts:
    """The same facts by the plainest reader: line by line, character by character."""
    found = Facts([], [], [], [], [], [], [])
    sequences: list[bytes] = []
    at = 0
    for number, line in enumerate(content.replace(b"\r", b"\n").split(b"\n")):
        start = at
        if number == 0 and line.startswith(BOM):
            start, line = 3, line[3:]
        if line.startswith(b">"):
            found.offsets.append(start)
            found.names.append(b"".join(line[1:].split()[:1]).decode("utf-8", "backslashreplace"))
            found.headers.append(line[1:].strip().decode("utf-8", "backslashreplace"))
            sequences.append(b"")
        elif sequences:
            sequences[-1] += b"".join(line.split())
        at = start + len(line) + 1
    for sequence in sequences:
        text = re.sub(r"(?<![.-])\.$", "", sequence.decode("latin-1")).removesuffix("*")
        tokens = re.findall(r"<mask>|.", text, re.DOTALL | re.IGNORECASE)
        known = [t.lower() if len(t) > 1 else t.upper() for t in tokens if t.isascii()]
        known = [t for t in known if t in ESM.tok_to_idx]
        ids = [ESM.tok_to_idx.get(t.lower() if len(t) > 1 else t.upper(), ESM.get_idx("X")) for t in tokens]
        found.ids.append(ids)
        found.lengths.append(len(ids))
        found.replaced.append(len(tokens) - len(known))
    found.unique_of = [found.ids.index(ids) for ids in found.ids]
    return found


def letters(ids: bytes) -> str:
    return "".join(ESM.get_tok(i) for i in ids)


names = st.text("abcXYZ019_|/.:-", min_size=1, max_size=12)
proteins = st.text(AMINO, min_size=1, max_size=60)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(names, st.sampled_from(["", " some words", "\ttab"]), proteins), min_size=1, max_size=8,
             unique_by=lambda record: record[0]),
    st.integers(1, 30), st.sampled_from(["\n", "\r\n"]), st.booleans(),
)  # fmt: skip
def test_names_and_residues_are_those_of_pyfaidx(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, str, str]], width: int, newline: str, final: bool
) -> None:
    lines = []
    for name, description, protein in records:
        lines += [f">{name}{description}", *(protein[i : i + width] for i in range(0, len(protein), width))]
    path = tmp_path_factory.mktemp("oracle") / "in.fasta"
    path.write_bytes((newline.join(lines) + newline * final).encode())
    table = read(path)
    with pyfaidx.Fasta(str(path), as_raw=True, sequence_always_upper=True) as oracle:
        assert table.names(0, len(table)) == list(oracle.keys())
        assert [letters(ids) for ids in table.token_ids(np.arange(len(table)))] == [record[:] for record in oracle]
    shutil.rmtree(path.parent)


WILD = {
    "one record": b">a\nMKV\n",
    "crlf": b">a one\r\nMKV\r\nLAA\r\n>b\r\nMK\r\n",
    "lower case": b">a\nmkvLa\n>b\nMKVLA\n",
    "blank lines": b"\n\n>a\n\nMKV\n\n\nLA\n\n>b\n\n\n>c\nMK\n\n",
    "irregular wrapping": b">a\nM\nKVLAGG\nA\nACDEFGHIKL\n>b\nMKVLAG\nGA\n",
    "no final newline": b">a\nMKV\n>b\nMKVL",
    "ends in a header": b">a\nMKV\n>b",
    "ends in a bare mark": b">a\nMKV\n>",
    "tabs": b">a\tone two\nMK\tV L\n>\tb three\nMKVL\n",
    "utf-8 headers": ">prot\u00e9ine \u03b2-lactamase\nMKV\n>\u86cb\u767d\u00a0one word\nMK\n".encode(),
    "headers that are not utf-8": b">prot\xe9ine x\xff\nMKV\n",
    "bom": BOM + b">a\nMKV\n>b\nMK\n",
    "bom and crlf and blank lines": BOM + b"\r\n\r\n>a\r\nMKV\r\n",
    "duplicate names": b">a\nMKV\n>a\nMKL\n>a\nMKV\n",
    "slashes and quotes": b">../a/b\\c \"d'\nMKV\n>/\nMK\n",
    "marks in headers": b">a > b >c\nMKV\n>>b\nMK\n>c*<mask>\nMK\n",
    "no names": b">\nMKV\n> \nMK\n>  after blanks\nM\n",
    "header of 10,000 characters": b">" + b"n" * 9000 + b" " + b"d" * 999 + b"\nMKV\n>b\nMK\n",
    "protein of 35,000 residues": b">titin\n" + b"MKVLAGWY\n" * 4375 + b">b\nMK\n",
    "trailing star": b">a\nMKV*\n>b\nMKV\n*\n>c\nMKV*",
    "trailing star, crlf and blanks": b">a\r\nMKV*\r\n\r\n>b\r\nMKV* \r\n>c\r\nMKV\r\n",
    "two trailing stars": b">a\nMKV**\n>b\nMKVX\n",
    "internal star": b">a\nMK*V\n>b\n*MKV\n>c\nMK*V*\n>d\nMKXV\n",
    "nothing but stars": b">a\n*\n>b\n**\n>c\nX\n",
    "empty records": b">a\n>b\nMKV\n>c\n\n>d\n \n>e\n",
    "gaps": b">a\nMK-V.L\n>b\n--MK\n",
    "stops that are dots": b">a\nMKV.\n>b\nMK.V.\n>c\nMKV..\n>d\n.\n>e\nMKV-.\n>f\nM<mask>.\n>g\nMKV*.\n>h\nMKV.*\n>i\nMKV\n.",
    "line feeds and carriage returns": b">a\rMKV\r>b\nML\n>c\r\nMKL\r\n>d x\rMK\r\rV\n\r>e\r",
    "carriage returns alone": b">a\rMKV\rML\r>b\rMK",
    "unknown characters": b">a\nMJJJK1234\xc3\xa9\n>b\nMXXXKXXXXXX\n>c\n<MK<\n",
    "mask tokens": b">a\nM<mask>K\n>b\nM<MA\nSK>K\n>c\n<mask><mask>*\n>d\nMXK\n",
    "a star before a mask": b">a\nM*<mask>\n>b\nMX<mask>\n",
    "a mask and unknown characters": b">a\n1<mask>J<<mask>\n",
    "dna": b">a\nACGTACGTNNacgtu\n",
}


@pytest.mark.parametrize("content", WILD.values(), ids=WILD.keys())
def test_a_wild_file_gives_what_a_plain_reader_finds(table_of: Callable[..., RecordTable], content: bytes) -> None:
    assert facts(table_of(content)) == plainly(content)


@pytest.mark.parametrize("content", WILD.values(), ids=WILD.keys())
def test_chunk_boundaries_leave_no_trace(
    table_of: Callable[..., RecordTable], monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    whole = table_of(content)
    for size in [7, 8, 9, 13, 31, 64]:
        monkeypatch.setattr(fasta.reading, "READ_BYTES", size)
        pieces = table_of(content)
        monkeypatch.undo()
        assert pieces.sha256 == whole.sha256 == [hashlib.sha256(content).hexdigest()]
        assert pieces.nucleotide_share == whole.nucleotide_share
        assert facts(pieces) == facts(whole)


headers = st.binary(max_size=20).map(lambda text: re.sub(rb"[\r\n\0]", b"", text))
pieces = st.sampled_from(
    [b"M", b"k", b"ACD", b"*", b"J", b"-", b"<", b"<mask>", b"<MA\nSK>", b" ", b"\t", b"\xc3", b"\n", b"\r\n"]
)
sequences = st.lists(pieces, max_size=12).map(b"".join)


@settings(max_examples=400)
@given(
    st.sampled_from([b"", BOM, b"\n", b"\r\n\r\n", b" \n"]),
    st.lists(st.tuples(headers, st.sampled_from([b"\n", b"\r\n", b"\r"]), sequences), min_size=1, max_size=8),
    st.sampled_from([7, 8, 11, 16, 37, 64, 1 << 20]), st.booleans(),
)  # fmt: skip
def test_any_file_gives_what_a_plain_reader_finds_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    before: bytes,
    records: list[tuple[bytes, bytes, bytes]],
    size: int,
    final: bool,
) -> None:
    content = before + b"\n".join(b">" + header + newline + sequence for header, newline, sequence in records)
    content += b"\n" * final
    path = tmp_path_factory.getbasetemp() / "any.fasta"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta.reading, "READ_BYTES", size)
        table = read(path)
    assert facts(table) == plainly(content)


def test_blank_lines_before_the_first_record_may_span_chunks(
    table_of: Callable[..., RecordTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fasta.reading, "READ_BYTES", 16)
    content = b"\n" * 50 + b">a\nMKV\n>b\nMK\n"
    assert facts(table_of(content)) == plainly(content)


def test_any_number_of_blank_lines_may_come_first(table_of: Callable[..., RecordTable]) -> None:
    content = b"\n" * 70_000 + b">a\nMKV\n"
    assert facts(table_of(content)) == plainly(content)


def test_a_header_longer_than_a_chunk_keeps_its_whole_name(
    table_of: Callable[..., RecordTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fasta.reading, "READ_BYTES", 64)
    content = b">" + b"n" * 500 + b" words\nMKV\n>" + b"m" * 500 + b"\nMK\n"
    table = table_of(content)
    assert table.names(0, 2) == ["n" * 500, "m" * 500]
    assert table.names(0, 1) == ["n" * 500]
    assert table.names(1, 2, full=True) == ["m" * 500]


def test_any_range_of_names_is_that_slice_of_all_names(
    make_fasta: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read(make_fasta([5] * 30, "one.fasta"), make_fasta([5] * 30, "two.fasta"))
    monkeypatch.setattr(fasta.reading, "READ_BYTES", 50)
    expected = [f"p{i}" for i in range(30)] * 2
    for start, stop in itertools.combinations_with_replacement(range(0, 61, 5), 2):
        assert table.names(start, stop) == expected[start:stop]


def test_records_that_lie_far_apart_or_in_several_files_are_read_as_well(
    make_fasta: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [read(make_fasta([7] * 50)), read(make_fasta([5] * 50, "a.fasta"), make_fasta([6, 0, 9] * 20, "b.fasta"))]
    for most in (100, 200, 1 << 20):
        monkeypatch.setattr(fasta.table, "MOST_AHEAD", most)
        monkeypatch.setattr(fasta.table, "AHEAD", 64)
        for table in tables:
            every = np.random.default_rng(0).permutation(len(table))
            for order in (every, every[every < 40], every[every > 60], np.repeat(every[:3], 20)):
                if len(order):
                    assert table.tokens(order).tobytes() == b"".join(table.token_ids(order))


def test_token_ids_come_in_the_order_asked_for(make_fasta: Callable[..., Path]) -> None:
    table = read(make_fasta([3, 9, 5]))
    everything = table.token_ids(np.arange(3))
    assert table.token_ids(np.array([2, 0, 2])) == [everything[2], everything[0], everything[2]]


def test_residues_are_the_sum_of_all_lengths(make_fasta: Callable[..., Path]) -> None:
    assert read(make_fasta([3, 9, 5])).residues == 17


# Several files, compression, pipes


def test_several_files_are_read_as_one_after_the_other(tmp_path: Path) -> None:
    contents = [b">a\nMKV\n>b\nML", BOM + b">a\nMKV*", b"\n>c\nMKV\n>d\n", b">e\nML\n"]
    paths = [tmp_path / f"{i}.fasta" for i in range(4)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    table = read(*paths)
    found = facts(table)
    assert found.names == found.headers == ["a", "b", "a", "c", "d", "e"]
    assert found.ids == [ids for content in contents for ids in plainly(content).ids]
    assert found.unique_of == [0, 1, 0, 0, 4, 1], "identical proteins are found across files"
    assert table.sha256 == [hashlib.sha256(content).hexdigest() for content in contents]


PLAIN = b"".join(b">p%d\n%s\n" % (i, b"MKVLAGWY"[i % 5 :] * (1 + i % 7)) for i in range(300))


@pytest.mark.parametrize("kind", COMPRESS)
def test_compression_is_known_by_content_and_leaves_no_trace(
    table_of: Callable[..., RecordTable], tmp_path: Path, kind: str
) -> None:
    plain = table_of(PLAIN)
    for name in (f"in.fasta.{kind}", "misnamed.fasta"):
        table = table_of(COMPRESS[kind](PLAIN), name)
        assert facts(table) == facts(plain)
        assert table.sha256 == plain.sha256
    assert {path.name for path in tmp_path.iterdir()} == {"in.fasta", f"in.fasta.{kind}", "misnamed.fasta"}


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_files_joined_by_cat_are_read_to_the_end(table_of: Callable[..., RecordTable], kind: str) -> None:
    half = PLAIN.index(b"\n>", len(PLAIN) // 2) + 1
    joined = COMPRESS[kind](PLAIN[:half]) + COMPRESS[kind](PLAIN[half:])
    assert facts(table_of(joined)) == plainly(PLAIN)


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
def test_a_truncated_compressed_file_is_an_error(table_of: Callable[..., RecordTable], kind: str, keep: float) -> None:
    compressed = COMPRESS[kind](PLAIN)
    with pytest.raises(UserError, match=rf"in\.fasta\.{kind} is damaged"):
        table_of(compressed[: int(len(compressed) * keep)], f"in.fasta.{kind}")


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_flipped_byte_in_a_compressed_file_is_an_error(table_of: Callable[..., RecordTable], kind: str) -> None:
    options = {"options": {zstd.CompressionParameter.checksum_flag: 1}} if kind == "zst" else {}
    damaged = bytearray(COMPRESS[kind](PLAIN, **options))
    damaged[len(damaged) // 2] ^= 0xFF
    with pytest.raises(UserError, match=rf"in\.fasta\.{kind} is damaged"):
        table_of(bytes(damaged), f"in.fasta.{kind}")


class Trickle(io.RawIOBase):
    """A pipe that gives one byte a read."""

    def __init__(self, content: bytes):
        self.left = iter(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        byte = bytes(itertools.islice(self.left, 1))
        buffer[: len(byte)] = byte
        return len(byte)


@pytest.mark.parametrize("pack", [bytes, *COMPRESS.values()], ids=["plain", *COMPRESS])
@pytest.mark.parametrize("content", [PLAIN, b">a", b""], ids=["long", "short", "empty"])
def test_a_pipe_that_gives_a_byte_at_a_time_is_known_by_content(pack: Callable[[bytes], bytes], content: bytes) -> None:
    with fasta.decompressed(io.BufferedReader(Trickle(pack(content)))) as file:
        assert file.read() == content


@pytest.mark.parametrize("content", [PLAIN, gzip.compress(PLAIN)], ids=["plain", "gz"])
def test_a_pipe_is_read_like_a_file(tmp_path: Path, content: bytes) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[content])
    writer.start()
    table = read(pipe)
    writer.join()
    assert facts(table) == plainly(PLAIN)


@pytest.mark.parametrize("content", [PLAIN, gzip.compress(PLAIN)], ids=["plain", "gz"])
def test_standard_input_is_read_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    with open(tmp_path / "in") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        table = fasta.index(fasta.open_sources(["-"], tmp_path))
    assert facts(table) == plainly(PLAIN)
    assert table.sources[0].path == "standard input"


# Identical proteins


def test_identical_proteins_share_the_first_whatever_their_text(table_of: Callable[..., RecordTable]) -> None:
    table = table_of(
        b">a\nMKV\n>b\nML\n>c\nm k\nv*\n>d\nMKV<mask>\n>e\nMKV\n>f\nMKV<MASK>\n>g\nMJ\n>h\nMX\n>i\n>j\n*\n"
    )
    assert table.unique_of.tolist() == [0, 1, 0, 3, 0, 3, 6, 6, 8, 8]


def test_without_dedup_every_protein_stands_for_itself(table_of: Callable[..., RecordTable]) -> None:
    assert table_of(b">a\nMKV\n>b\nMKV\n", dedup=False).unique_of.tolist() == [0, 1]


def test_proteins_that_share_half_a_hash_are_kept_apart() -> None:
    digests = np.array([[7, 2], [5, 9], [7, 1], [7, 2], [7, 1], [5, 9]], np.uint64)
    assert fasta.indexing.first_of_equal(digests).tolist() == [0, 1, 2, 0, 2, 1]


def test_nucleotides_are_told_from_proteins(table_of: Callable[..., RecordTable]) -> None:
    assert table_of(b">a\nACGTNacgtu\n*\n").nucleotide_share == [1]
    assert table_of(b">a\nAWAW\n>b\nCK\n").nucleotide_share == [0.5]
    assert table_of(b">a\n").nucleotide_share == [0]


def test_a_mask_is_no_nucleotide(table_of: Callable[..., RecordTable]) -> None:
    assert table_of(b">a\n<mask>M<mask>\n").nucleotide_share == [0]


# Files that are refused

REFUSED = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \r\n\n", "is empty"),
    "blank and long": (b"\n" * 70_000, "is empty"),
    "bom alone": (BOM, "is empty"),
    "compressed nothing": (gzip.compress(b""), "is empty"),
    "binary": (b"\x7fELF\x02\x01\0\0\0\0>\n", "a binary file"),
    "fastq behind a blank line": (b"\n@read1\nACGT\n+\nIIII\n", "not FASTQ"),
    "bam": (gzip.compress(b"BAM\1\0\0\0\0"), "BAM or CRAM"),
    "sam": (b"@HD\tVN:1.6\n@SQ\tSN:a\tLN:9\nr\t4\n", "is SAM"),
    "html": (b"\n<!DOCTYPE html>\n<html></html>\n", "HTML"),
    "utf-16": ("\ufeff>a\nMKV\n".encode("utf-16-le"), "UTF-16"),
    "utf-16, big end first": ("\ufeff>a\nMKV\n".encode("utf-16-be"), "UTF-16"),
    "utf-16 without a bom": (">a\nMKV\n".encode("utf-16-le"), "a binary file"),
    "plain text": (b"MKVLAGW\n", "starts with 'MKVLAGW'"),
    "fastq of another alphabet": (gzip.compress(b"@read1\nAC>T\n+\nIIII\n"), "line 2 holds '>'"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_fasta_is_refused_by_name_and_kind(
    table_of: Callable[..., RecordTable], content: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        table_of(content, "wrong.fasta")
    assert "wrong.fasta" in caught.value.what


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*nowhere\.fasta"):
        fasta.open_sources([str(tmp_path / "nowhere.fasta")], tmp_path)


def test_a_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} is a directory")):
        fasta.open_sources([str(tmp_path)], tmp_path)


def test_nul_bytes_near_the_start_are_an_error(table_of: Callable[..., RecordTable]) -> None:
    with pytest.raises(UserError, match=r"in\.fasta is a binary file"):
        table_of(b">a\nMKV\n\0\0\0")


@pytest.mark.parametrize("size", [64, 1 << 20])
def test_nul_bytes_in_the_middle_are_an_error_with_the_line(
    table_of: Callable[..., RecordTable], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(fasta.reading, "READ_BYTES", size)
    with pytest.raises(UserError, match=r"in\.fasta line 20002 holds NUL"):
        table_of(b">a\nMKV\n" * 10_000 + b">b\nMK\0\0\n>c\nMK\n")


@pytest.mark.parametrize("before", [0, 1000])
def test_a_mark_inside_a_sequence_line_is_an_error_with_record_and_line(
    table_of: Callable[..., RecordTable], monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    monkeypatch.setattr(fasta.reading, "READ_BYTES", 64)
    with pytest.raises(UserError, match=rf"in\.fasta: record 'b' \(line {2 * before + 3}\) has a '>' inside"):
        table_of(b">a\nMKV\n" * before + b">a\nMK\n>b two\nMKV>c\nMKV\n")


def test_a_byte_order_mark_of_a_joined_file_is_named(table_of: Callable[..., RecordTable]) -> None:
    with pytest.raises(UserError, match=r"record 'a' \(line 1\) has a '>' inside.*\n.*byte order mark"):
        table_of(b">a\nMKV\n" + BOM + b">b\nMK\n")


INVALID = {
    "one letter": (b">a\nMKV\n>b x\nMKJV\n", "'b'", 4, 3, "J"),
    "the second line": (b">a\nMKV\nMKV1\n", "'a'", 3, 4, "1"),
    "the first of two": (b">a\nMKV\n>b\nMK1V2\n>c\nM3\n", "'b'", 4, 3, "1"),
    "crlf": (b">a\r\nMKV\r\n>b\r\nMKV\r\nM?\r\n", "'b'", 5, 2, "?"),
    "blank lines and a bom": (BOM + b"\n\n>a\n\nMK\n\n KJ\n", "'a'", 7, 3, "J"),
    "an internal star": (b">a\nMKV*\n>b\nM*K*\n", "'b'", 4, 2, "*"),
    "a star that ends a line but no protein": (b">a\nMKV*\n\nMK*\n", "'a'", 2, 4, "*"),
    "two trailing stars": (b">a\nMKV**\n", "'a'", 2, 4, "*"),
    "a bracket": (b">a\nMK<V\n", "'a'", 2, 3, "<"),
    "a letter behind a mask": (b">a\nM<mask>K1\n", "'a'", 2, 9, "1"),
    "a star before a mask": (b">a\nM*<mask>\n", "'a'", 2, 2, "*"),
    "a name that is not utf-8": (b">a\xff\nM1\n", repr("a\\xff"), 2, 2, "1"),
    "no final newline": (b">a\nMK\n>b\nM1", "'b'", 4, 2, "1"),
}


@pytest.mark.parametrize(("content", "name", "line", "column", "shown"), INVALID.values(), ids=INVALID.keys())
@pytest.mark.parametrize("size", [7, 1 << 20])
def test_the_first_invalid_residue_is_named_with_its_place(
    table_of: Callable[..., RecordTable], monkeypatch: pytest.MonkeyPatch,
    content: bytes, name: str, line: int, column: int, shown: str, size: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(fasta.reading, "READ_BYTES", size)
    with pytest.raises(UserError) as caught:
        table_of(content, on_invalid="error")
    assert f"in.fasta: record {name}, line {line}, column {column}: {shown!r}" in caught.value.what


def test_an_invalid_residue_is_placed_in_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "one.fasta").write_bytes(b">a\nMKV\n" * 5)
    (tmp_path / "two.fasta").write_bytes(b">a\nMKV\n>b\nM!\n")
    with pytest.raises(UserError, match=r"two\.fasta: record 'b', line 4, column 2"):
        read(tmp_path / "one.fasta", tmp_path / "two.fasta", on_invalid="error")


def test_a_clean_file_passes_the_strictest_reading(table_of: Callable[..., RecordTable]) -> None:
    content = b">a J1\nMKV*\n>b\nmkXBUZO.\n\n>c\n>d\nM<mask>K*\r\n"
    assert facts(table_of(content, on_invalid="error")) == plainly(content)


# Files that change


def test_a_file_that_is_appended_to_is_an_error(make_fasta: Callable[..., Path]) -> None:
    path = make_fasta([5, 5])
    table = read(path)
    table.check_unchanged()
    with open(path, "a") as file:
        file.write(">late\nMKV\n")
    with pytest.raises(UserError, match=r"in\.fasta was changed"):
        table.check_unchanged()


def test_a_file_that_is_truncated_is_an_error_when_its_records_are_read(make_fasta: Callable[..., Path]) -> None:
    path = make_fasta([50, 50])
    table = read(path)
    os.truncate(path, 60)
    with pytest.raises(UserError, match=r"in\.fasta was changed"):
        table.token_ids(np.array([1]))
    with pytest.raises(UserError, match=r"in\.fasta was changed"):
        table.tokens(np.array([0, 1] * 20))
    with pytest.raises(UserError, match=r"in\.fasta was changed"):
        table.names(0, 2)
    with pytest.raises(UserError, match=r"in\.fasta was changed"):
        table.check_unchanged()


def test_a_file_edited_in_place_to_the_same_size_is_an_error(make_fasta: Callable[..., Path]) -> None:
    path = make_fasta([5, 5])
    table = read(path)
    path.write_bytes(path.read_bytes().replace(b"p1", b"p2"))
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match=r"in\.fasta was changed"):
        table.check_unchanged()


def test_a_record_that_has_lost_residues_is_an_error_and_not_its_neighbours(make_fasta: Callable[..., Path]) -> None:
    path = make_fasta([50, 50])
    table = read(path)
    path.write_bytes(path.read_bytes()[:-20] + b"\n" * 20)
    assert len(table.tokens(np.array([0]))) == 50
    for records in ([1], [0, 1] * 20):
        with pytest.raises(UserError, match=r"in\.fasta was changed"):
            table.tokens(np.array(records))


def test_a_file_replaced_or_deleted_after_the_index_is_still_read_as_it_was(make_fasta: Callable[..., Path]) -> None:
    path = make_fasta([5, 5])
    content = path.read_bytes()
    table = read(path)
    other = path.with_name("other")
    other.write_bytes(b">x\nMMMMMMMM\n")
    other.replace(path)
    path.unlink()
    table.check_unchanged()
    assert facts(table) == plainly(content)


# --- what is no sequence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b";", b"#", b"!"])
@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
def test_a_comment_is_refused_with_its_line(table_of: Callable[..., RecordTable], mark: bytes, ends: bytes) -> None:
    lines = [b">p1 x", b"MKV", b">p2", b"MK", mark + b"a remark of fasta-pearson", b"ML", b""]
    with pytest.raises(UserError, match=r"in\.fasta line 5 is a comment"):
        table_of(ends.join(lines))


@pytest.mark.parametrize("kind", ["plain", *COMPRESS])
@pytest.mark.parametrize("ends", [b"\n", b"\r"])
def test_the_remedy_for_comments_leaves_a_file_without_them(tmp_path: Path, kind: str, ends: bytes) -> None:
    text = ends.join([b">p1", b"MKV", b"# a remark", b">p2", b"ML", b""])
    path = tmp_path / "in.fasta"
    path.write_bytes(COMPRESS[kind](text) if kind != "plain" else text)
    with pytest.raises(UserError, match="is a comment") as caught:
        fasta.index(fasta.open_sources([str(path)], tmp_path))
    if kind != "plain" and shutil.which(PROGRAMS[kind]) is None:
        pytest.skip(f"{PROGRAMS[kind]} is not installed")
    subprocess.run(caught.value.remedy.partition(": ")[2], shell=True, cwd=tmp_path, check=True)
    clean = fasta.index(fasta.open_sources([str(tmp_path / "without-comments.fasta")], tmp_path))
    assert clean.length.tolist() == [3, 2]


def test_a_pir_file_is_refused_with_the_line_of_its_title(table_of: Callable[..., RecordTable]) -> None:
    with pytest.raises(UserError, match=r"in\.fasta line 6 is the title of a PIR record"):
        table_of(b">a;b\nMKV\n>P1;b\nMKV\n>P1;PROT1\nFIRST PROTEIN\nEAK\nMKF*\n")
    assert len(table_of(b">P1;size=100\nMKVLAG\nMKV\n")) == 1, "the name alone makes no PIR"


GAPPED = [b"MK-VL.AG", b"--MKVLAG--", b"MKVL.", b"M<mask>-KV.", b"..--", b"MKV-*", b"m-k-v-*", b"MKVLAG", b".", b"-"]


def test_gaps_are_counted_and_kept_as_fair_esm_has_them(table_of: Callable[..., RecordTable]) -> None:
    content = b"".join(b">%d\n%s\n" % (i, text) for i, text in enumerate(GAPPED))
    table = table_of(content)
    assert facts(table) == plainly(content)
    assert table.gaps.tolist() == [2, 4, 0, 1, 4, 1, 3, 0, 0, 1]


@pytest.mark.parametrize("size", [7, 16, 1 << 20])
@pytest.mark.parametrize(("policy", "letter"), [("strip", b""), ("x", b"x")])
def test_a_policy_for_gaps_reads_what_a_file_without_them_says(
    table_of: Callable[..., RecordTable],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    letter: bytes,
    size: int,
) -> None:
    """`x` reads a gap as X, which is in the alphabet: --invalid has nothing to say of it."""
    monkeypatch.setattr(fasta.reading, "READ_BYTES", size)
    texts = [re.sub(rb"(?<![.-])\.$", b"", text) for text in GAPPED]
    other = b"".join(b">%d\n%s\n" % (i, re.sub(rb"[.-]", letter, text)) for i, text in enumerate(texts))
    expected = facts(table_of(other, "other.fasta"))
    path = tmp_path / "in.fasta"
    path.write_bytes(b"".join(b">%d\n%s\n" % (i, text) for i, text in enumerate(GAPPED)))
    table = fasta.index(fasta.open_sources([str(path)], tmp_path), gaps=policy)
    found = facts(table)
    assert (found.ids, found.lengths, found.replaced) == (expected.ids, expected.lengths, expected.replaced)
    assert found.unique_of == expected.unique_of
    assert table.gaps.tolist() == [2, 4, 0, 1, 4, 1, 3, 0, 0, 1]
    assert table.tokens(np.arange(len(table))).tolist() == [i for ids in expected.ids for i in ids]


@pytest.mark.parametrize("options", [{"gaps": "error"}, {"on_invalid": "error"}])
def test_gaps_that_are_errors_are_named_with_line_and_column(tmp_path: Path, options: dict[str, str]) -> None:
    path = tmp_path / "in.fasta"
    path.write_bytes(b">t1\nMKVL.\n>t2\nMK\nV.LA\n")
    with pytest.raises(UserError, match=r"record 't2', line 5, column 2: '\.' is not a residue") as caught:
        fasta.index(fasta.open_sources([str(path)], tmp_path), **options)
    assert "--gaps strip" in caught.value.remedy


DICE = random.Random(0)
CONTIG = "".join(DICE.choices("ACGT", k=600))
PROTEIN = "".join(DICE.choices("ACDEFGHIKLMNPQRSTVWY", k=600))
NUCLEOTIDES = {
    "plain": CONTIG,
    "aligned": "".join(c + "-" * DICE.randrange(4) for c in CONTIG),
    "ambiguous": "".join(DICE.choice("RYSWKMBDHV") if i % 4 == 0 else c for i, c in enumerate(CONTIG)),
    "masked": "".join("X" if i % 5 < 3 else c for i, c in enumerate(CONTIG)),
    "unknown": CONTIG[:100] + "N" * 500,
    "dotted": CONTIG.replace("A", "."),
}


@pytest.mark.parametrize("text", NUCLEOTIDES.values(), ids=NUCLEOTIDES.keys())
def test_nucleotides_are_known_by_their_letters_alone(table_of: Callable[..., RecordTable], text: str) -> None:
    table = table_of(f">a\n{text}\n>b\n{text[::-1]}\n".encode())
    assert table.nucleotide_share[0] >= fasta.NUCLEOTIDE_SHARE
    assert table.nucleotide_like.tolist() == [0, 1]
    among = table_of(f">p\n{PROTEIN}\n>a\n{text}\n>q\n{PROTEIN[::-1]}\n".encode())
    assert among.nucleotide_share[0] < fasta.NUCLEOTIDE_SHARE and among.nucleotide_like.tolist() == [1]


@pytest.mark.parametrize(
    "text", ["GAGAGSGAGAGY" * 20, "-" * 600 + "MKVLE", "X" * 400, "MKV", "ACGT", PROTEIN, "A" * 10]
)
def test_proteins_of_few_kinds_of_letters_are_no_nucleotides(table_of: Callable[..., RecordTable], text: str) -> None:
    table = table_of(f">a\n{text}\n>p\n{PROTEIN}\n".encode())
    assert table.nucleotide_like.tolist() == [] and table.nucleotide_share[0] < fasta.NUCLEOTIDE_SHARE


def test_no_real_protein_looks_like_nucleotides() -> None:
    assert read(UNIPROT).nucleotide_like.tolist() == []


# --- every byte, and files as they are --------------------------------------------------------------------------------

BEHIND = {"text": b">behind\nMKV\n", "zeros": bytes(12), "another": None}


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("what", BEHIND)
def test_what_lies_behind_a_stream_is_read_or_refused(
    table_of: Callable[..., RecordTable], kind: str, what: str
) -> None:
    """Zeros may follow a stream of xz or gzip. Nothing else but a stream may follow one."""
    half = PLAIN.index(b"\n>", len(PLAIN) // 2) + 1
    first, second = COMPRESS[kind](PLAIN[:half]), COMPRESS[kind](PLAIN[half:])
    if what == "another":
        assert facts(table_of(first + second)) == plainly(PLAIN)
        damaged = bytearray(second)
        damaged[len(second) // 2] ^= 0xFF
        content = first + bytes(damaged) if kind != "zst" else first + second[:-3]
    elif what == "zeros" and kind in ("xz", "gz"):
        padding = BEHIND[what] or b""
        assert facts(table_of(first + padding + second + padding)) == plainly(PLAIN)
        return
    else:
        content = first + second + (BEHIND[what] or b"")
    with pytest.raises(UserError, match="is damaged"):
        table_of(content)


def test_a_zstandard_file_may_begin_with_a_frame_without_content(table_of: Callable[..., RecordTable]) -> None:
    frame = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"size"
    assert facts(table_of(frame + COMPRESS["zst"](PLAIN) + frame)) == plainly(PLAIN)


@pytest.mark.parametrize("room", [24, 100])
def test_more_files_than_may_be_open_are_read(tmp_path: Path, room: int) -> None:
    paths = [tmp_path / f"{i}.fa{'.gz' * (i % 2)}" for i in range(300)]
    for i, path in enumerate(paths):
        text = b">p%d\nMKV%s\n" % (i, b"ACDEFGHIKL"[: i % 10])
        path.write_bytes(gzip.compress(text) if i % 2 else text)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + room, limits[1]))
    try:
        table = read(*paths)
        assert table.names(0, 300) == [f"p{i}" for i in range(300)]
        assert [len(ids) for ids in table.token_ids(np.arange(300))] == [3 + i % 10 for i in range(300)]
        table.check_unchanged()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_file_that_may_not_be_opened_any_more_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKV\n")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(UserError, match="ulimit -n"):
            read(tmp_path / "in.fasta")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_change_with_its_time_put_back_is_noticed_and_a_new_link_is_none(tmp_path: Path) -> None:
    path = tmp_path / "in.fasta"
    path.write_bytes(b">a\nMKV\n")
    table, status = read(path), path.stat()
    os.link(path, tmp_path / "link")
    table.check_unchanged()
    path.write_bytes(b">a\nMKL\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match="was changed while it was being read"):
        table.check_unchanged()


UNREADABLE = Path("/proc/self/mem")
"""It opens, and the system cannot read what is at its beginning, as on a disk that fails."""


@pytest.mark.skipif(not UNREADABLE.exists(), reason="this machine has no /proc")
@pytest.mark.parametrize("name", [str(UNREADABLE), "-"], ids=["file", "pipe"])
def test_a_file_that_the_system_cannot_read_is_named_with_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shown = "standard input" if name == "-" else name
    with open(UNREADABLE, "rb") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(UserError, match=f"^{shown} cannot be read: Input/output error"):
            fasta.open_sources([name], tmp_path)


@pytest.mark.skipif(not UNREADABLE.exists(), reason="this machine has no /proc")
def test_a_file_that_the_system_cannot_read_any_more_is_named_with_what_it_says() -> None:
    status = UNREADABLE.stat()
    state = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    source = Source("in.fasta", 10, 0, str(UNREADABLE), state)
    with pytest.raises(UserError, match=r"^in\.fasta cannot be read: Input/output error"):
        source.read(0, 10)


def test_spooling_leaves_room_on_the_disk(
    table_of: Callable[..., RecordTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([1 << 40, 1 << 40, 1 << 20])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    monkeypatch.setattr(fasta.reading, "READ_BYTES", 64)
    with pytest.raises(UserError, match=r"in\.fasta cannot be spooled to .*MB are free there"):
        table_of(gzip.compress(b">a\n" + b"M" * 20_000))


def test_a_small_disk_is_enough_for_a_small_file(
    table_of: Callable[..., RecordTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100 << 20))
    assert len(table_of(gzip.compress(b">a\nMKV\n"))) == 1


# Streams of compressed files, and pipes of tables


def test_padding_of_xz_comes_in_fours(table_of: Callable[..., RecordTable]) -> None:
    half = PLAIN.index(b"\n>", len(PLAIN) // 2) + 1
    streams = [lzma.compress(PLAIN[:half]), lzma.compress(PLAIN[half:])]
    assert facts(table_of(bytes(8).join(streams) + bytes(4))) == plainly(PLAIN)
    for damaged in (bytes(3).join(streams), b"".join(streams) + bytes(5)):
        with pytest.raises(UserError, match=r"in\.fasta is damaged"):
            table_of(damaged)


@pytest.mark.parametrize("kind", ["plain", *COMPRESS])
def test_a_text_table_may_come_through_a_pipe(tmp_path: Path, kind: str) -> None:
    text = b"a\tx\nb\ty\n"
    pipe = tmp_path / "groups.tsv"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[COMPRESS.get(kind, bytes)(text)], daemon=True)
    writer.start()
    assert list(tables.Lines(str(pipe))) == ["a\tx\n", "b\ty\n"]
    writer.join()
