"""The plainest FASTA reader there is, a record at a time. It shares no code with the index, so that it can judge it."""

import hashlib
from collections.abc import Iterator
from typing import IO

from virnucpro_cli.fasta import decompressed

RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"


def records(path: str, sha: "hashlib._Hash | None" = None) -> Iterator[tuple[bytes, bytes]]:
    """(header without `>`, raw text of the lines joined) of every record, plain or compressed; feeds `sha` every byte."""
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


def clean(text: bytes, gaps: str = "keep") -> tuple[str, int, int]:
    """Text of a record that is embedded, the number of its residues, and how many of those were replaced by X.

    White space, one trailing `*`, and one trailing `.` that follows a residue are dropped, lower case is raised, `<mask>`
    is one token, and what is outside the alphabet becomes X. gaps: `strip` drops `-` and `.`, `x` makes them X.
    """
    upper = text.translate(None, b"\n\r \t\v\f" + (b"-." if gaps == "strip" else b"")).upper()
    if upper[-1:] == b"." and upper[-2:-1] not in (b".", b"-"):
        upper = upper[:-1]
    upper = upper.removesuffix(b"*")
    if gaps == "x":
        upper = upper.translate(bytes.maketrans(b"-.", b"XX"))
    pieces = upper.decode("latin-1").split("<MASK>")
    replaced = sum(letter not in RESIDUES for piece in pieces for letter in piece)
    if replaced:
        pieces = ["".join(letter if letter in RESIDUES else "X" for letter in piece) for piece in pieces]
    return "<mask>".join(pieces), sum(map(len, pieces)) + len(pieces) - 1, replaced
