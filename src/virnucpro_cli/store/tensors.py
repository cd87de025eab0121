"""An embeddings file as a dataset of PyTorch, for a DataLoader with or without workers. Rows are read from a memory map."""

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

    A row is [D], or [L, D] of residues, in the dtype of the file. A worker that gets a pickled one opens the file again, and refuses
    another that has its name by then.
    """

    def __init__(self, file: "EmbeddingFile", kind: str | None = None, layer: int | None = None):
        if kind is None and file.default is None:
            kind = "residue"
        self.kind, self.layer = file.what(kind, layer)
        self.records: NDArray[np.int64] = np.flatnonzero(file.status == DONE)
        self._reopen = file.__reduce__()
        self._open(file)

    def _open(self, file: "EmbeddingFile") -> None:
        self._array = file.array(self.kind, self.layer)
        self._offsets = file.residue_offsets if self.kind == "residue" else np.arange(len(file) + 1)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_array", "_offsets")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        reopened, arguments = self._reopen
        with reopened(*arguments) as file:
            self._open(file)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        record = int(self.records[index])
        first, last = self._offsets[record : record + 2]
        rows = torch.from_numpy(np.array(self._array[first:last]))
        return (rows if self.kind == "residue" else rows[0]), record


def padded(batch: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residues of several proteins in one tensor, as a `collate_fn`: rows [B, longest L, D], zero behind the end of each; lengths
    int64 [B]; record numbers int64 [B].
    """
    rows, records = [rows for rows, _ in batch], [record for _, record in batch]
    lengths = torch.tensor([len(each) for each in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, torch.tensor(records)
