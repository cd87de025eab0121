"""Everything that the file will ever hold, written by HDF5 before the first forward; embeddings have their place and no value."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import stopping
from virnucpro_cli.alphabet import TOKENS
from virnucpro_cli.kinds import by_residue, pooled
from virnucpro_cli.store.schema import (
    CHECKSUM_BYTES,
    ENVIRONMENT_BYTES,
    FLAG_NAMES,
    LAYOUT_BYTES,
    REASONS,
    REPORT_BYTES,
    SCHEMA,
    STATUS_NAMES,
    blocks,
)
from virnucpro_cli.store.sink import Sink


@dataclass(frozen=True)
class Names:
    """Names of something, read when they are wanted. of(start, stop): those of a range; bytes: of all of them, at most."""

    count: int
    of: Callable[[int, int], list[str]]
    bytes: int

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Extra:
    """What a file holds besides the records' own columns and embeddings; names are those of datasets.

    columns: a value for each record [N]; tables: arrays and names of anything else; rows: groups of datasets `NAME/<layer>` of so
    many rows in the store dtype, and values: datasets of so many single ones, which are filled later. changing: names of columns and tables whose
    values change while the file is filled. fingerprint and counts are the caller's to use.
    """

    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    tables: "dict[str, NDArray[Any] | Names]" = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    changing: frozenset[str] = frozenset()

    def __or__(self, other: "Extra") -> "Extra":
        return Extra(**{f.name: getattr(self, f.name) | getattr(other, f.name) for f in fields(Extra)})

    def part(self, records: NDArray[np.int64]) -> "Extra":
        """That of a part of the records."""
        return replace(self, columns={name: values[records] for name, values in self.columns.items()})


@dataclass(frozen=True)
class Layout:
    """Everything the file will ever hold except embeddings. N records, D hidden.

    names(start, stop) gives the record names of a range, name_bytes bounds their total; residue_offsets int64 [N + 1] only with per-residue output.
    """

    hidden: int
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    store_dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    replaced: NDArray[np.int32]
    flags: NDArray[np.uint16]
    status: NDArray[np.uint8]
    reason: NDArray[np.uint8]
    residue_offsets: NDArray[np.int64] | None
    names: Callable[[int, int], list[str]]
    name_bytes: int  # of all names, at most
    records: NDArray[np.int64] | None = None  # of a shard: the number of each record in the input
    environment: str = "{}"  # of this run, in a line (several, with computed_by): see Store.compute_in
    computed_by: NDArray[np.uint8] | None = None  # all zero, unless they are known
    unmasked: tuple[str, ...] = ()  # datasets of /unmasked: logits by residue in the store dtype, scores float32 (N)
    attributes: dict[str, Any] = field(default_factory=dict)
    extra: Extra = field(default_factory=Extra)

    @property
    def filled(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Name -> shape and type of every dataset that has its place now and its values later: embeddings, scores, groups' rows."""
        n = len(self.lengths)
        residues = int(self.residue_offsets[-1]) if self.residue_offsets is not None else 0
        rows = {kind: residues if kind == "residue" else n for kind in self.kinds}
        found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            f"{name}/{layer}": ((count, self.hidden), self.store_dtype)
            for name, count in (rows | self.extra.rows).items()
            for layer in self.layers
        }
        for name in self.unmasked:
            logits = by_residue("unmasked", name)
            shape, dtype = ((residues, len(TOKENS)), self.store_dtype) if logits else ((n,), np.dtype(np.float32))
            found[f"unmasked/{name}"] = (shape, dtype)
        return found | {name: ((count,), self.store_dtype) for name, count in self.extra.values.items()}

    @property
    def columns(self) -> "dict[str, NDArray[Any] | Names]":
        """Name -> values of every dataset that is final, or has a first value, from the start."""
        own = {name: getattr(self, name) for name in ("lengths", "replaced", "flags", "status", "reason")}
        own["computed_by"] = np.zeros(len(self.lengths), np.uint8) if self.computed_by is None else self.computed_by
        own |= {"records": self.records} if self.records is not None else {}
        own |= {"residue/offsets": self.residue_offsets} if self.residue_offsets is not None else {}
        ids = Names(len(self.lengths), self.names, self.name_bytes)
        return {"sequence_ids": ids, **own, **self.extra.columns, **self.extra.tables}

    @property
    def changing(self) -> set[str]:
        """Names of all datasets whose bytes are not final when the file is laid out."""
        columns = {"status", "flags", "reason", "computed_by", *self.extra.changing}
        return {*self.filled, *columns, *(f"run/{name}" for name in RUN)}

    @property
    def data_bytes(self) -> int:
        """Bytes of what is filled later."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.filled.values())

    @property
    def scores(self) -> list[str]:
        return [name for name in self.unmasked if not by_residue("unmasked", name)]

    @property
    def file_bytes(self) -> int:
        """What the whole file takes at most: embeddings, names with their heap entries, small columns, HDF5's own."""
        columns = sum(56 * c.count + c.bytes if isinstance(c, Names) else c.nbytes for c in self.columns.values())
        columns += 8 * len(self.lengths)  # /run/sums
        return self.data_bytes + columns + REPORT_BYTES + ENVIRONMENT_BYTES + (1 << 17)


RUN = ("report", "environments", "checksum", "layout", "sums", "complete")
"""Datasets of /run, which say how far the file is, and vouch for it."""


def _create_contiguous(file: Any, path: str, shape: tuple[int, ...], dtype: Any) -> None:
    """A dataset whose bytes have their place in the file from the start, and are not touched by HDF5."""
    folder, _, name = path.rpartition("/")
    group = file.require_group(folder) if folder else file
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, creation)


def of_this_command() -> dict[str, Any]:
    """Attributes of a new file that say when it is made, and by which command."""
    return {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "argv": json.dumps(sys.argv)}


def lay_out(fd: int, layout: Layout) -> None:
    """Write everything but embeddings, and make the file exactly as long as HDF5 says. Raises OSError."""
    sink = Sink(fd)
    try:
        with stopping.held():
            _write_layout(sink, layout)
    finally:
        sink.end()
    os.ftruncate(fd, sink.size)


def _write_names(file: Any, name: str, names: Names, sink: Sink) -> None:
    dataset = file.create_dataset(name, (names.count,), h5py.string_dtype("utf-8"))
    for rows in sink.each(blocks(names.count)):
        stopping.check()
        dataset[rows] = names.of(rows.start, rows.stop)


def _write_layout(sink: Sink, layout: Layout) -> None:
    with h5py.File(sink, "w") as file:
        for key, value in (layout.attributes | layout.extra.attributes).items():
            file.attrs[key] = value
        file.attrs["columns"] = json.dumps(list(layout.extra.columns))
        file.attrs["tables"] = json.dumps(list(layout.extra.tables))
        file.attrs["schema"] = SCHEMA
        file.attrs["status_names"] = json.dumps(dict(enumerate(STATUS_NAMES)))
        file.attrs["flag_names"] = json.dumps(FLAG_NAMES)
        file.attrs["reason_names"] = json.dumps(dict(enumerate(REASONS)))
        for name, values in sink.each(layout.columns.items()):
            if isinstance(values, Names):
                _write_names(file, name, values, sink)
            else:
                _create_contiguous(file, name, values.shape, values.dtype)
                file[name][...] = values
        for name, (shape, dtype) in layout.filled.items():
            _create_contiguous(file, name, shape, dtype)
        if kinds := pooled(layout.kinds):
            file["embeddings"] = file[kinds[0]][str(layout.layers[-1])]
        texts = {"report": b"{}", "environments": layout.environment.encode() + b"\n", "checksum": b"", "layout": b""}
        sizes = {
            "report": REPORT_BYTES, "environments": ENVIRONMENT_BYTES, "checksum": CHECKSUM_BYTES, "layout": LAYOUT_BYTES,
        }  # fmt: skip
        for name, text in texts.items():
            _create_contiguous(file, f"run/{name}", (), f"S{sizes[name]}")
            file[f"run/{name}"][()] = text
        _create_contiguous(file, "run/sums", (len(layout.lengths),), np.uint64)
        _create_contiguous(file, "run/complete", (), np.uint8)
        file["run/complete"][()] = 0
