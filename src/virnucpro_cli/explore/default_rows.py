"""The rows that map and search look at: those that are done, of one dataset, read in blocks from a memory map."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import store
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.kinds import POOLED


@dataclass(frozen=True)
class Pooled:
    """The n done rows of a dataset, fp16 or fp32 [N, D]. rows: int64 [n], their numbers; size: most rows of a block."""

    file: store.EmbeddingFile
    kind: str
    layer: int
    array: NDArray[Any] = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    size: int = 4096

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Row numbers (int64 [m]) and values ([m, D] in the dtype of the file), block by block in order."""
        for block in store.blocks(len(self.rows), self.size):
            yield self.rows[block], self.array[self.rows[block]]

    def mean(self) -> NDArray[np.float64]:
        """Mean of all rows, float64 [D]."""
        return sum(values.sum(axis=0, dtype=np.float64) for _, values in self.blocks()) / len(self)

    def lacking(self) -> str:
        """How many proteins have no row, in words; empty if all have one."""
        n, pending = len(self.file), int((self.file.status == store.PENDING).sum())
        skipped = n - len(self) - pending
        parts = [f"{count:,} {word}" for count, word in ((skipped, "skipped"), (pending, "not computed yet")) if count]
        return f"{', '.join(parts)} of {counted(n, self.file.words[0])}" if parts else ""


def of(file: store.EmbeddingFile, kind: str | None = None, layer: int | None = None) -> Pooled:
    """Rows of a kind and layer, by default those of /embeddings. Raises UserError if the file lacks them."""
    if kind is None and file.default is None:
        raise UserError(
            f"{file.path} has no /embeddings: it holds per-residue rows only.",
            "Embed with --pool mean (or mean,residue).",
        )
    if kind == "residue":
        raise UserError("Rows of residues are none of proteins.", f"Choose --kind {' or '.join(POOLED)}.")
    kind, layer = file.kind_and_layer(kind, layer)
    return Pooled(file, kind, layer, file.array(kind, layer), np.flatnonzero(file.status == store.DONE))
