"""Parts of an embeddings file beside rows of records: rows of groups, contact maps, rows of another model."""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.store import frames, schema, sums
from virnucpro_cli.store.checked import Dataset
from virnucpro_cli.store.schema import DONE, PENDING

if TYPE_CHECKING:
    import pandas

At = Callable[[str], Dataset]
"""Gives the dataset of a name."""


class Groups:
    """Groups of records. of: int64 [N], the group of each record, -1 for none."""

    def __init__(self, at: At, texts: Callable[[str, int, int], list[str]], layer: Callable[[int | None], int]):
        self._at, self._texts, self._layer = at, texts, layer
        self.of: NDArray[np.int64] = at("groups/of")[:]

    def __len__(self) -> int:
        return len(self._at("groups/ids"))

    @cached_property
    def ids(self) -> list[str]:
        """Names of the groups."""
        return self._texts("groups/ids", 0, len(self))

    @property
    def members(self) -> NDArray[np.int64]:
        """int64 [G]: records of each group that were embedded."""
        return self._at("groups/members")[:]

    def rows(self, kind: str = "mean", layer: int | None = None) -> Dataset:
        """A row for each group, [G, D]: mean, length_weighted_mean or max of its members' means. NaN if it has none."""
        return self._at(f"groups/{kind}/{self._layer(layer)}")

    def to_pandas(self, kind: str = "mean", layer: int | None = None) -> "pandas.DataFrame":
        """Groups that have members: name (the index), members, and a column float32 for each dimension, "0", "1" ..."""
        there = self.members > 0
        labels = {"name": np.array(self.ids, object)[there], "members": self.members[there]}
        return frames.to_pandas(labels, self.rows(kind, layer)[:][there])


class ContactMaps:
    """Contact maps of records. values: all of them, flat; starts: int64 [N], where each record's begins, -1 for none;
    sizes: int32 [N], its residues; status: uint8 [N], of codes as /status.
    """

    def __init__(self, at: At):
        self.values: Dataset = at("contacts/values")
        self.starts: NDArray[np.int64] = at("contacts/starts")[:]
        self.sizes: NDArray[np.int32] = at("contacts/sizes")[:]
        self.status: NDArray[np.uint8] = at("contacts/status")[:]

    @property
    def done(self) -> int:
        return int((self.status == DONE).sum())

    @property
    def pending(self) -> int:
        return int((self.status == PENDING).sum())

    def of(self, row: int) -> NDArray[Any]:
        """The map of a record, float16 or float32 [L, L]; empty if it has none."""
        return self.raw(row) if self.status[row] == DONE else self.values[:0].reshape(0, 0)

    def raw(self, row: int) -> NDArray[Any]:
        """The values at the place of a record's map, float16 or float32 [L, L], whatever its status."""
        size, first = int(self.sizes[row]), int(self.starts[row])
        return self.values[first : first + size * size].reshape(size, size)


class File(Protocol):
    """The file that has a half."""

    @property
    def environment_lines(self) -> list[str]: ...
    def at(self, name: str) -> Dataset: ...
    def rows_at(self, name: str, first: int, count: int) -> NDArray[Any]: ...
    def mapped(self, data: Any) -> NDArray[Any]: ...


class Half:
    """Rows that another model has of the same N records, in a folder of the file.

    status, reason, computed_by: uint8 [N], flags: uint16 [N], as those of the file itself.
    names: datasets of rows, such as mean/12. settings: entries of the fingerprint.
    """

    def __init__(self, file: File, name: str, settings: dict[str, Any]):
        self.file, self.name = file, name
        self.status, self.flags, self.reason, self.computed_by = (self.at(each)[:] for each in schema.STATES)
        self.names = [f"{kind}/{layer}" for kind in settings["pool"] for layer in settings["layers"]]

    def at(self, name: str) -> Dataset:
        """The dataset of that name in the folder. Raises UserError if there is none."""
        return self.file.at(schema.name_in(self.name, name))

    def rows_at(self, name: str, first: int, count: int) -> NDArray[Any]:
        """A row of a dataset and those that follow it, [count, D] in its dtype; see `EmbeddingFile.rows_at`."""
        return self.file.rows_at(schema.name_in(self.name, name), first, count)

    def array(self, name: str) -> NDArray[Any]:
        """A dataset as a read-only memory map, float16 or float32 [N, D]."""
        return self.file.mapped(self.at(name))

    @property
    def state_sums(self) -> NDArray[np.uint64]:
        """Digests of what each record's status, flags, reason and environment are, uint64 [N]."""
        return sums.of_states([self.at(name)[:] for name in schema.STATES], self.file.environment_lines)
