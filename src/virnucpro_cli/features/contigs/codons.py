"""Codons to residues by the standard genetic code (NCBI table 1), and the proteins of a contig."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

ORDER: Final = b"TCAG"
RESIDUES: Final = b"FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
"""NCBI table 1, codons in the order TTT, TTC, TTA, TTG, TCT ..."""
X: Final = ord("X")
STOP: Final = ord("*")

GAP: Final = 50
"""Letters in a row, none of them A, C, G or T, from which they are a gap. Pyrodigal masks from the same number."""
_GAP = re.compile(b"[^ACGT]{%d,}" % GAP)
_COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")
_BASE = np.full(256, 4, np.uint8)
_BASE[list(ORDER)] = range(4)
_RESIDUE = np.full(125, X, np.uint8)
_RESIDUE.reshape(5, 5, 5)[:4, :4, :4] = np.frombuffer(RESIDUES, np.uint8).reshape(4, 4, 4)


def residues_at(sequence: bytes) -> NDArray[np.uint8]:
    """The residue of the codon that begins at each base, uint8 [n - 2]; X where a base is none of A, C, G and T."""
    code = _BASE[np.frombuffer(sequence, np.uint8)]
    return _RESIDUE[25 * code[:-2] + 5 * code[1:-1] + code[2:]]


def reverse_complement(sequence: bytes) -> bytes:
    """That of upper-case text; what is none of A, C, G and T stays as it is, and is none in either direction."""
    return sequence.translate(_COMPLEMENT)[::-1]


def gaps(sequence: bytes) -> list[tuple[int, int]]:
    """[start, stop) of each gap of upper-case text, in order."""
    return [match.span() for match in _GAP.finditer(sequence)]


@dataclass(frozen=True)
class Genes:
    """n proteins of one contig, from any caller.

    text: FASTA; begin, end: int64 [n], first and last base on the contig, 1-based, begin < end whatever the strand;
    strand: int8 [n], 1 or -1. slices: FASTA of the bases behind each, in the reading direction, if they are wanted.
    """

    text: bytes
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    strand: NDArray[np.int8]
    slices: bytes = b""

    @classmethod
    def of(cls, text: bytes, places: Iterable[tuple[int, int, int]], slices: bytes = b"") -> Self:
        """places: (begin, end, strand) of each protein."""
        begin, end, strand = np.array(list(places), np.int64).reshape(-1, 3).T
        return cls(text, begin, end, strand.astype(np.int8), slices)


def on_contig(begin: int, end: int, strand: int, n: int) -> tuple[int, int]:
    """First and last base on a contig of n bases, of a place on one of its strands."""
    return (begin, end) if strand > 0 else (n + 1 - end, n + 1 - begin)


def record(name: str, begin: int, end: int, strand: int, residues: bytes) -> bytes:
    """A record with a header in the style of Prodigal."""
    return b">%s # %d # %d # %d\n%s\n" % (name.encode(), begin, end, strand, residues)
