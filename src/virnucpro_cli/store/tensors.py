"""Rows as a dataset of PyTorch, for a DataLoader with or without workers. They are read from a memory map."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset


class Rows(Dataset[tuple[torch.Tensor, int]]):
    """(row, number of the record) of each of `records`, int64 [M]. A row is [D] or [L, D], in the dtype of the file.

    rows: those of all records [n, D]; offsets: int64 [N + 1] where those of each begin, None where each record has one.
    again: a function, and its arguments, that makes the dataset anew in a worker.
    """

    def __init__(
        self, records: NDArray[np.int64], rows: NDArray[Any], offsets: NDArray[np.int64] | None,
        again: tuple[Callable[..., "Rows"], tuple[Any, ...]],
    ):  # fmt: skip
        self.records, self._rows, self._offsets, self._again = records, rows, offsets, again

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        record = int(self.records[index])
        rows = self._rows[record] if self._offsets is None else self._rows[slice(*self._offsets[record : record + 2])]
        return torch.from_numpy(np.array(rows)), record


def padded(batch: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residues of several proteins in one tensor, as a `collate_fn`.

    Gives rows [B, longest L, D] in the dtype of the file, zero behind the end of each; lengths and records, int64 [B].
    """
    rows, records = [rows for rows, _ in batch], [record for _, record in batch]
    lengths = torch.tensor([len(each) for each in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, torch.tensor(records)
