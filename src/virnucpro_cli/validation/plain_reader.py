"""The plainest FASTA reader there is, a record at a time. It shares no code with the index, so that it can judge it."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import store
from virnucpro_cli.alphabet import Reading
from virnucpro_cli.fasta import decompressed

ODD_LETTERS = b"XUBZO.-<"


class Letters(NamedTuple):
    """Letters of a model family. read_as: the one that each of them is read as; unknown: the one for all others."""

    read_as: Mapping[str, str]
    unknown: str = "X"


def letters_of(reading: Reading) -> Letters:
    """The letters of a reading."""
    return Letters({letter: letter for letter in reading.letters} | dict(reading.also), reading.unknown)


RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
FAIR_ESM = Letters({letter: letter for letter in RESIDUES})


class PlainTable(NamedTuple):
    """The facts of n records of some files.

    lengths, replaced: int64 [n], residues; odd: uint16 [n], a bit for each letter of ODD_LETTERS in the text, and one
    for replaced residues; sequences, names: void [n] of 16 bytes, digests of the cleaned text and of the name.
    """

    sha256: list[str]
    lengths: NDArray[np.int64]
    replaced: NDArray[np.int64]
    odd: NDArray[np.uint16]
    sequences: NDArray[Any]
    names: NDArray[Any]


def read(paths: Iterable[str], id_policy: str = "first", gaps: str = "keep", letters: Letters = FAIR_ESM) -> PlainTable:
    """Every record of the files, in order. id_policy, gaps: as --id and --gaps of embed; letters: as in `clean`."""
    shas, lengths, replaced, odd, sequences, names = [], array("q"), array("q"), array("H"), bytearray(), bytearray()
    for path in paths:
        sha = hashlib.sha256()
        for header, text in records(path, sha):
            cleaned, length, wrong = clean(text, gaps, letters)
            upper = text.upper()
            odd.append(sum(1 << bit for bit, code in enumerate(ODD_LETTERS) if code in upper) | (wrong > 0) << 15)
            lengths.append(length)
            replaced.append(wrong)
            sequences += _digest(cleaned)
            names += _digest(name_of(header, id_policy == "full"))
        shas.append(sha.hexdigest())
    return PlainTable(
        shas, np.asarray(lengths, np.int64), np.asarray(replaced, np.int64), np.asarray(odd, np.uint16),
        np.frombuffer(sequences, "V16"), np.frombuffer(names, "V16"),
    )  # fmt: skip


def other_names(file: store.EmbeddingFile, names: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each name, a digest as of a PlainTable, void [N], is another than that of the file's record, bool [N]."""
    there = bytearray()
    for block in store.blocks(len(file)):
        for name in file.names_of(block.start, block.stop):
            there += _digest(name)
    return names != np.frombuffer(there, "V16")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def records(path: str, sha: "hashlib._Hash | None" = None) -> Iterator[tuple[bytes, bytes]]:
    """Header without `>` and raw text, its lines joined, of every record; feeds `sha` every byte that is read."""
    header: bytes | None = None
    lines: list[bytes] = []
    with open(path, "rb") as raw, decompressed(raw) as file:
        for line in _lines(file, sha):
            if line.startswith(b">") or (header is None and line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b">"):
                if header is not None:
                    yield header, b"".join(lines)
                header = line.partition(b">")[2].strip()
                lines = []
            else:
                lines.append(line)
    if header is not None:
        yield header, b"".join(lines)


def _lines(file: IO[bytes], sha: "hashlib._Hash | None") -> Iterator[bytes]:
    """Lines with their ends, whichever those are: LF, CRLF or CR."""
    left = b""
    while block := file.read(1 << 20):
        if sha is not None:
            sha.update(block)
        lines = (left + block).splitlines(keepends=True)
        left = lines.pop()  # it may go on, or its CR be half an end
        yield from lines
    yield from left.splitlines(keepends=True)


def name_of(header: bytes, full: bool = False) -> str:
    """A record's name: its header up to the first white space, or all of it."""
    word = header if full else b"".join(header.split(None, 1)[:1])
    return word.decode("utf-8", "backslashreplace")


def clean(text: bytes, gaps: str = "keep", letters: Letters = FAIR_ESM) -> tuple[str, int, int]:
    """Text of a record that is embedded, the number of its residues, and how many of those were replaced.

    White space, one trailing `*`, and one trailing `.` that follows a residue are dropped. Lower case is raised,
    `<mask>` is one token, and a letter outside the alphabet becomes the unknown one, X for proteins.
    gaps: `strip` drops `-` and `.`, `x` makes them unknown. letters: of the model family.
    """
    upper = text.translate(None, b"\n\r \t\v\f" + (b"-." if gaps == "strip" else b"")).upper()
    if upper[-1:] == b"." and upper[-2:-1] not in (b".", b"-"):
        upper = upper[:-1]
    upper = upper.removesuffix(b"*")
    if gaps == "x":
        upper = upper.translate(bytes.maketrans(b"-.", 2 * letters.unknown.encode()))
    pieces = upper.decode("latin-1").split("<MASK>")
    known = letters.read_as
    replaced = sum(letter not in known for piece in pieces for letter in piece)
    if replaced or letters != FAIR_ESM:
        pieces = ["".join(known.get(letter, letters.unknown) for letter in piece) for piece in pieces]
    return "<mask>".join(pieces), sum(map(len, pieces)) + len(pieces) - 1, replaced
