"""Codons to residues by the standard genetic code (NCBI table 1), at every base of a sequence at once."""

import re
from typing import Final

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


def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    base = np.full(256, 4, np.uint8)
    base[list(ORDER)] = range(4)
    residue = np.full((5, 5, 5), X, np.uint8)
    residue[:4, :4, :4] = np.frombuffer(RESIDUES, np.uint8).reshape(4, 4, 4)
    return base, residue.reshape(-1)


_BASE, _RESIDUE = _tables()


def residues_at(sequence: bytes) -> NDArray[np.uint8]:
    """The residue of the codon that begins at each base, uint8 [n - 2]; X where a base is none of A, C, G and T. Upper case."""
    code = _BASE[np.frombuffer(sequence, np.uint8)]
    return _RESIDUE[25 * code[:-2] + 5 * code[1:-1] + code[2:]]


def reverse_complement(sequence: bytes) -> bytes:
    """Of upper-case text; what is none of A, C, G and T stays as it is, and is none in either direction."""
    return sequence.translate(_COMPLEMENT)[::-1]


def gaps(sequence: bytes) -> list[tuple[int, int]]:
    """[start, stop) of each gap of upper-case text, in order."""
    return [found.span() for found in _GAP.finditer(sequence)]
