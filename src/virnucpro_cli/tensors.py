"""An embeddings file as a dataset of PyTorch, for a DataLoader with or without workers. Rows are read from a memory map."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from virnucpro_cli.store.schema import DONE

if TYPE_CHECKING:
    from virnucpro_cli.store import EmbeddingFile


class Rows(Dataset[tuple[torch.Tensor, int]]):
    """(row, number of the record) of each record that is done: skipped ones, whose rows are NaN, are left out.

    A row is [D], or [L, D] of residues, in the dtype of the file. What is pickled for a worker is the file's name; the
    worker opens it again.
    """

    def __init__(self, file: "EmbeddingFile", kind: str | None = None, layer: int | None = None):
        self.path, self.kind, self.layer = file.path.absolute(), kind, layer
        self.records: NDArray[np.int64] = np.flatnonzero(file.status == DONE)
        self._open(file)

    def _open(self, file: "EmbeddingFile") -> None:
        self._array = file.array(self.kind, self.layer)
        self._offsets = file.residue_offsets if self.kind == "residue" else np.arange(len(file) + 1)

    def __getstate__(self) -> tuple[Path, str | None, int | None, NDArray[np.int64]]:
        return self.path, self.kind, self.layer, self.records

    def __setstate__(self, state: Any) -> None:
        from virnucpro_cli.store import read_embeddings

        self.path, self.kind, self.layer, self.records = state
        with read_embeddings(self.path) as file:
            self._open(file)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        record = int(self.records[index])
        first, last = self._offsets[record : record + 2]
        rows = torch.from_numpy(np.array(self._array[first:last]))
        return (rows if self.kind == "residue" else rows[0]), record
