"""What every gene caller returns: the proteins of one contig, as FASTA text and as coordinates."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Genes:
    """n proteins of one contig. text: FASTA; begin, end: int64 [n], first and last base on the contig, 1-based, begin < end
    whatever the strand; strand: int8 [n], 1 or -1.
    """

    text: bytes
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    strand: NDArray[np.int8]

    @classmethod
    def of(cls, text: bytes, places: Iterable[tuple[int, int, int]]) -> Self:
        """places: (begin, end, strand) of each protein."""
        begin, end, strand = np.array(list(places), np.int64).reshape(-1, 3).T
        return cls(text, begin, end, strand.astype(np.int8))


def record(name: str, begin: int, end: int, strand: int, residues: bytes) -> bytes:
    """A record with a header in the style of Prodigal."""
    return b">%s # %d # %d # %d\n%s\n" % (name.encode(), begin, end, strand, residues)
