"""The rows that map and search look at: those of the default embedding that are done, read in blocks from a memory map."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import store
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.kinds import POOLED

BLOCK = 4096


@dataclass(frozen=True)
class Pooled:
    """The done rows of a file. kind and layer: those of the default embedding; rows int64 [n]: their numbers."""

    file: store.EmbeddingFile
    kind: str
    layer: int
    array: NDArray[Any] = field(repr=False)  # [N, D]
    rows: NDArray[np.int64] = field(repr=False)
    size: int = BLOCK  # rows of a block, at most

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """(row numbers [m], values [m, D] in the dtype of the file) of all rows in order."""
        for block in store.blocks(len(self.rows), self.size):
            yield self.rows[block], self.array[self.rows[block]]

    def mean(self) -> NDArray[np.float64]:
        total = np.zeros(self.array.shape[1])
        for _, values in self.blocks():
            total += values.sum(axis=0, dtype=np.float64)
        return total / len(self)


def of(file: store.EmbeddingFile, path: str, kind: str | None = None, layer: int | None = None) -> Pooled:
    """Rows of a kind and layer, by default those of /embeddings. Raises UserError if the file lacks them."""
    if kind is None and file.default is None:
        raise UserError(
            f"{path} has no /embeddings: it holds per-residue rows only.", "Embed with --pool mean (or mean,residue)."
        )
    if kind == "residue":
        raise UserError("Rows of residues are none of proteins.", f"Choose --kind {' or '.join(POOLED)}.")
    kind, layer = file.kind_and_layer(kind, layer)
    return Pooled(file, kind, layer, file.array(kind, layer), np.flatnonzero(file.status == store.DONE))


def lacking(data: Pooled) -> str:
    """A line on the proteins that have no row, for whoever looks at the others; empty if all have one."""
    n, pending = len(data.file), int((data.file.status == store.PENDING).sum())
    skipped = n - len(data) - pending
    parts = [f"{skipped:,} skipped"] * (skipped > 0) + [f"{pending:,} not computed yet"] * (pending > 0)
    return f"{', '.join(parts)} of {counted(n, 'protein')}" if parts else ""
