"""Records by name, in 16 bytes a record: by the whole name, or by the accession in it."""

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.store.schema import blocks


def accession(name: str) -> str:
    """`Q87479` of `tr|Q87479|Q87479_SIV`, a name as UniProt has them; of another name itself."""
    found = re.match(r"(?:sp|tr)\|([^|]+)\|", name)
    return found[1] if found else name


class NameIndex:
    """Rows by the hash of what `key` makes of their names. names_of(start, stop) reads those of a range; names_at(rows) of some."""

    def __init__(
        self,
        count: int,
        names_of: Callable[[int, int], list[str]],
        names_at: Callable[[NDArray[np.int64]], list[str]],
        key: Callable[[str], str] = str,
    ):
        self._names_at, self._key = names_at, key
        hashes = np.empty(count, np.int64)
        for rows in blocks(count):
            hashes[rows] = [hash(key(name)) for name in names_of(rows.start, rows.stop)]
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def __call__(self, wanted: str) -> list[int]:
        """Rows in order; their names are read and compared. Empty if there is none."""
        first, last = np.searchsorted(self._hashes, hash(wanted)), np.searchsorted(self._hashes, hash(wanted), "right")
        rows = self._order[first:last]
        return [row for row, name in zip(rows.tolist(), self._names_at(rows), strict=True) if self._key(name) == wanted]
