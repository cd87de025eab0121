"""Rows as a dataset of PyTorch, for a DataLoader with or without workers. They are read from a memory map."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

Found = tuple[NDArray[Any], NDArray[np.int64] | None]


class Rows(Dataset[tuple[torch.Tensor, int]]):
    """(row, number of the record) of each record in `records`, int64 [M].

    found: the rows [n, D] of all records, and int64 [N + 1] where those of each begin, or None where each has one. A row is [D]
    then, and [L, D] otherwise, in the dtype of the file. find_again: gives them to a worker that gets a pickled dataset.
    """

    def __init__(self, records: NDArray[np.int64], found: Found, find_again: Callable[[], Found]):
        self.records, self._find_again = records, find_again
        self._rows, self._offsets = found

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.records, self._find_again)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        record = int(self.records[index])
        rows = self._rows[record] if self._offsets is None else self._rows[slice(*self._offsets[record : record + 2])]
        return torch.from_numpy(np.array(rows)), record


def _again(records: NDArray[np.int64], find_again: Callable[[], Found]) -> Rows:
    return Rows(records, find_again(), find_again)


def padded(batch: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residues of several proteins in one tensor, as a `collate_fn`: rows [B, longest L, D], zero behind the end of each; lengths
    int64 [B]; record numbers int64 [B].
    """
    rows, records = [rows for rows, _ in batch], [record for _, record in batch]
    lengths = torch.tensor([len(each) for each in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, torch.tensor(records)
