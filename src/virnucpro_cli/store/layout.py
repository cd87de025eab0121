"""Everything that the file will ever hold, written before the first forward; embeddings have no values yet.

HDF5 writes it all but the texts, which NumPy writes in its format.
"""

import io
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import stopping
from virnucpro_cli.errors import UserError, damaged
from virnucpro_cli.kinds import pooled
from virnucpro_cli.store import schema
from virnucpro_cli.store.disk import pread_all, pwrite_all
from virnucpro_cli.texts import WORD, Texts, ranges

RUN = {
    "report": f"S{schema.REPORT_BYTES}", "environments": f"S{schema.ENVIRONMENT_BYTES}",
    "checksum": f"S{schema.CHECKSUM_BYTES}", "layout": f"S{schema.LAYOUT_BYTES}", "sums": "<u8", "complete": "|u1",
}  # fmt: skip
"""Datasets of /run with their types: they say how far the file is, and vouch for it."""

HEADER = 16
LARGEST, SMALLEST = 1 << 16, 1 << 12
"""Bytes of a collection: at most, unless one text takes more; and at least, as HDF5 demands."""
MOST_OVERHEAD = 56
"""Bytes that a text takes beside its own letters, at most: reference, header, padding, a collection's header."""
MOST_PACKING = 16
"""Threads that pack texts, at most; each holds a block of them."""
_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("number", "<u4")])
_GCOL = int.from_bytes(b"GCOL\x01\0\0\0", "little")
_END_AT = 40
"""Place of the file's end in a superblock of version 0."""
DEPTH = 4
"""Parts of a dataset's name, at most."""


@dataclass(frozen=True)
class Names:
    """Names, read when they are wanted. of(start, stop): those of a range; bytes: of all of them, at most."""

    count: int
    of: Callable[[int, int], list[str] | Texts]
    bytes: int

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Extra:
    """Datasets of a file besides columns of records and embeddings, by name.

    columns: a value for each record [N]; tables: arrays and names of anything else; rows: how many each group of
    datasets `NAME/<layer>` has, values: how many single ones a dataset has, all filled later in the store dtype;
    changing: columns and tables whose values change meanwhile; fingerprint and counts are the caller's to use.
    halves: layouts of the rows that other models have of the same records, by the names of `schema.HALVES`.
    """

    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    tables: "dict[str, NDArray[Any] | Names]" = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    changing: frozenset[str] = frozenset()
    halves: "dict[str, Layout]" = field(default_factory=dict)

    def __or__(self, other: "Extra") -> "Extra":
        return Extra(**{f.name: getattr(self, f.name) | getattr(other, f.name) for f in fields(Extra)})

    def part(self, records: NDArray[np.int64]) -> "Extra":
        """The same for a part of the records, int64 [n]."""
        return replace(self, columns={name: values[records] for name, values in self.columns.items()})


@dataclass(frozen=True)
class Layout:
    """Everything the file will ever hold except embeddings. N records, D hidden.

    names(start, stop) gives the record names of a range; residue_offsets, int64 [N + 1], are for rows of residues.
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
    names: Callable[[int, int], list[str] | Texts]
    name_bytes: int  # of all names, at most
    records: NDArray[np.int64] | None = None  # of a shard: the number of each record in the input
    environment: str = "{}"  # of this run, in a line (several, with computed_by): see Store.compute_in
    computed_by: NDArray[np.uint8] | None = None  # all zero, unless they are known
    unmasked: tuple[str, ...] = ()  # datasets of /unmasked: logits by residue in the store dtype, scores float32 (N)
    attributes: dict[str, Any] = field(default_factory=dict)
    extra: Extra = field(default_factory=Extra)
    vocabulary: int = 33  # columns of logits

    @property
    def filled(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Name -> shape and type of every dataset that has its place now and its values later."""
        n = len(self.lengths)
        residues = int(self.residue_offsets[-1]) if self.residue_offsets is not None else 0
        rows = {kind: residues if kind == "residue" else n for kind in self.kinds} | self.extra.rows
        filled: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            f"{name}/{layer}": ((count, self.hidden), self.store_dtype)
            for name, count in rows.items()
            for layer in self.layers
        }
        filled |= {f"unmasked/{name}": ((n,), np.dtype(np.float32)) for name in self.unmasked}
        if "logits" in self.unmasked:
            filled["unmasked/logits"] = ((residues, self.vocabulary), self.store_dtype)
        filled |= {name: ((count,), self.store_dtype) for name, count in self.extra.values.items()}
        for half, layout in self.extra.halves.items():
            filled |= {schema.name_in(half, name): each for name, each in layout.filled.items()}
        return filled

    @property
    def columns(self) -> "dict[str, NDArray[Any] | Names]":
        """Name -> values, [N] of the schema's dtypes, of every dataset that has values from the start."""
        n = len(self.lengths)
        columns: dict[str, Any] = {"sequence_ids": Names(n, self.names, self.name_bytes)}
        columns |= {"lengths": self.lengths, "replaced": self.replaced, **self.states}
        columns |= {"records": self.records, "residue/offsets": self.residue_offsets}
        columns |= self.extra.columns | self.extra.tables
        for half, layout in self.extra.halves.items():
            columns |= {schema.name_in(half, name): values for name, values in layout.states.items()}
        return {name: values for name, values in columns.items() if values is not None}

    @property
    def states(self) -> dict[str, NDArray[Any]]:
        """Columns that say what became of each record, [N] of the schema's dtypes, as they are at first."""
        unknown = np.zeros(len(self.lengths), np.uint8)
        computed_by = unknown if self.computed_by is None else self.computed_by
        return {"flags": self.flags, "status": self.status, "reason": self.reason, "computed_by": computed_by}

    @property
    def changing(self) -> set[str]:
        """Names of all datasets whose bytes are not final when the file is laid out."""
        columns = {*self.extra.changing, *(f"run/{name}" for name in RUN)}
        own = (*schema.STATES, "run/sums")
        halves = ("", *self.extra.halves)
        return {*self.filled, *columns, *(schema.name_in(half, name) for half in halves for name in own)}

    @property
    def data_bytes(self) -> int:
        """Bytes of the datasets that are filled later."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.filled.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file at most: embeddings, names with their heap entries, small columns, HDF5's own."""
        columns = sum(
            MOST_OVERHEAD * c.count + c.bytes if isinstance(c, Names) else c.nbytes for c in self.columns.values()
        )
        columns += 8 * len(self.lengths) * (1 + len(self.extra.halves))  # /run/sums
        return self.data_bytes + columns + schema.REPORT_BYTES + schema.ENVIRONMENT_BYTES + (1 << 17)


def of_this_command() -> dict[str, Any]:
    """Attributes of a new file that say when it is made, and by which command."""
    return {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "argv": json.dumps(sys.argv)}


# --- writing ---------------------------------------------------------------------------------------------------------


class Sink(io.RawIOBase):
    """An open file as HDF5 writes it through Python. HDF5 crashes when a write fails, and may close a file late.

    So no write fails here: an error, or a signal, is kept in `error`, and writes that follow it go to memory. `each`
    raises it soon. The file is never made smaller, so that room once reserved stays reserved; `size` is its size.
    """

    def __init__(self, fd: int):
        self._fd = fd
        self._at = self.size = 0
        self._after: list[tuple[int, bytes]] = []
        self._ended = False
        self.error: BaseException | None = None
        self.file: Any = None  # the h5py.File, for who needs both

    def each(self, blocks: Iterable[Any]) -> Iterator[Any]:
        """The blocks, as long as all that came of earlier ones is written."""
        for block in blocks:
            yield block
            if self.error is not None:
                raise self.error

    def end(self) -> None:
        """HDF5 is done: the descriptor may be another file's from now on. Raises the error of a write that failed."""
        self._ended = True
        self._after.clear()
        if self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None and not self._ended:
            try:
                pwrite_all(self._fd, view, self._at)
            except BaseException as error:
                self.error = error
        if self.error is not None and not self._ended:
            self._after.append((self._at, bytes(view)))
        self._at += view.nbytes
        self.size = max(self.size, self._at)
        return view.nbytes

    def readinto(self, into: Any) -> int:
        """Bytes of the file with zeros behind its end, and over them those that could not be written."""
        there = b"" if self._ended else os.pread(self._fd, len(into), self._at)
        data = bytearray(there.ljust(len(into), b"\0"))
        for offset, written in self._after:
            first, last = max(offset, self._at), min(offset + len(written), self._at + len(into))
            if first < last:
                data[first - self._at : last - self._at] = written[first - offset : last - offset]
        into[:] = data
        self._at += len(into)
        return len(into)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size


def lay_out(fd: int, layout: Layout) -> None:
    """Write everything but embeddings, and make the file exactly as long as HDF5 says. Raises OSError."""
    sink = Sink(fd)
    try:
        with stopping.held(), h5py.File(sink, "w") as file:
            _write_layout(sink, file, layout)
            texts = {file[name].id.get_offset(): names for name, names in _texts(layout) if len(names)}
    finally:
        sink.end()
    end = sink.size
    for offset, names in texts.items():
        end = _write_texts(fd, names, offset, end)
    _move_end(fd, sink.size, end)
    os.ftruncate(fd, end)


def _texts(layout: Layout) -> "list[tuple[str, Names]]":
    return [(name, values) for name, values in layout.columns.items() if isinstance(values, Names)]


def _write_layout(sink: Sink, file: h5py.File, layout: Layout) -> None:
    extra = layout.extra
    file.attrs.update(layout.attributes | extra.attributes)
    file.attrs["columns"] = json.dumps(list(extra.columns))
    file.attrs["tables"] = json.dumps(list(extra.tables))
    file.attrs["schema"] = schema.SCHEMA
    file.attrs["status_names"] = json.dumps(dict(enumerate(schema.STATUS_NAMES)))
    file.attrs["flag_names"] = json.dumps(schema.FLAG_NAMES)
    file.attrs["reason_names"] = json.dumps(dict(enumerate(schema.REASONS)))
    for name, values in sink.each(layout.columns.items()):
        if isinstance(values, Names):
            _create_contiguous(file, name, (values.count,), h5py.string_dtype("utf-8"), h5py.h5d.FILL_TIME_ALLOC)
        else:
            _create_contiguous(file, name, values.shape, values.dtype)
            file[name][...] = values
    for name, (shape, dtype) in layout.filled.items():
        _create_contiguous(file, name, shape, dtype)
    if kinds := pooled(layout.kinds):
        file["embeddings"] = file[kinds[0]][str(layout.layers[-1])]
    for name, word in RUN.items():
        for half in ("", *extra.halves) if name == "sums" else ("",):
            place = schema.name_in(half, f"run/{name}")
            _create_contiguous(file, place, (len(layout.lengths),) if name == "sums" else (), word)
    first = {
        "report": b"{}",
        "environments": layout.environment.encode() + b"\n",
        "checksum": b"",
        "layout": b"",
        "complete": 0,
    }
    for name, value in first.items():
        file[f"run/{name}"][()] = value


def _create_contiguous(
    file: h5py.File, path: str, shape: tuple[int, ...], dtype: Any, fill_time: int = h5py.h5d.FILL_TIME_NEVER
) -> None:
    """A dataset whose bytes have their place in the file from the start, and are not touched by HDF5."""
    folder, _, name = path.rpartition("/")
    group = file.require_group(folder) if folder else file
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(fill_time)
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    h5py.h5d.create(group.id, name.encode(), kind, space, creation)


# --- texts -----------------------------------------------------------------------------------------------------------
#
# HDF5 takes seconds to write a million texts, so NumPy does. A dataset of texts holds references: length, address of a
# collection, and number in it. A collection (GCOL) of the global heap holds texts, each behind a header of 16 bytes and
# padded to words of 8: version 1 in "Disk Format: Level 1E - Global Heap" of the HDF5 File Format Specification.
# Collections lie behind all that HDF5 has written, and the superblock is told where the file ends now.


def _collections(texts: Texts) -> tuple[NDArray[np.uint64], NDArray[Any]]:
    """Collections that hold texts, uint64 words [W], and references [n] to these, as if the first lay at address 0."""
    space = HEADER + texts.counts * WORD
    ends = np.cumsum(space)
    firsts, stops = np.array([*schema.chunks(np.append(0, ends), len(space), LARGEST - HEADER)]).T
    counts = stops - firsts  # texts of each collection
    used = HEADER + np.add.reduceat(space, firsts)
    sizes = np.maximum(used, SMALLEST)
    begins = np.cumsum(sizes) - sizes
    number = ranges(np.ones(len(counts), np.int64), counts)
    at = np.repeat(begins + HEADER - (ends - space)[firsts], counts) + ends - space  # of each text's header
    words = np.zeros(int(sizes.sum()) // WORD, np.uint64)
    words[begins // WORD], words[begins // WORD + 1] = _GCOL, sizes
    words[at // WORD], words[at // WORD + 1] = number, texts.lengths
    left = np.flatnonzero(sizes - used >= HEADER)  # free space is a text with the number 0
    words[(begins + used)[left] // WORD + 1] = (sizes - used)[left]
    words[ranges((at + HEADER) // WORD, texts.counts)] = texts.words
    references = np.empty(len(space), _REFERENCE)
    references["length"], references["number"] = texts.lengths, number
    references["address"] = np.repeat(begins, counts)
    return words, references


def packed(texts: list[str]) -> Texts:
    """Texts of any source, packed. Raises ValueError for a NUL byte, at which HDF5 would end a text."""
    if any("\0" in text for text in texts):
        raise ValueError("a text of HDF5 has no NUL byte")
    return Texts.of([text.encode("utf-8", "surrogateescape") for text in texts])


def _write_texts(fd: int, names: Names, references_at: int, end: int) -> int:
    """Write texts behind the `end` of a file, and the references to them. Returns where the file ends now.

    Threads pack the next blocks meanwhile: NumPy lets go of Python. Raises OSError if the disk fails.
    """

    def collected(rows: slice) -> tuple[NDArray[np.uint64], NDArray[Any]]:
        texts = names.of(rows.start, rows.stop)
        return _collections(texts if isinstance(texts, Texts) else packed(texts))

    with stopping.threads(MOST_PACKING, "names") as pool:
        left = (pool.submit(collected, rows) for rows in schema.blocks(names.count))
        packing = deque(islice(left, MOST_PACKING + 1))
        while packing:
            words, references = packing.popleft().result()
            packing.extend(islice(left, 1))
            stopping.check()
            end += -end % WORD
            references["address"] += end
            pwrite_all(fd, words.view(np.uint8).data, end)
            pwrite_all(fd, references.view(np.uint8).data, references_at)
            end, references_at = end + words.nbytes, references_at + references.nbytes
    return end


def texts_as_written(fd: int, references_at: int, start: int, stop: int) -> Texts | None:
    """The texts of references [start, stop), if they lie as they are written here, else None.

    references_at: where the first reference of all lies. Raises OSError if the disk fails.
    """

    def read(begin: int, size: int) -> NDArray[np.uint8]:
        data = np.zeros(size, np.uint8)  # zeros, which are no reference, where the file ends
        pread_all(fd, data.data, begin)
        return data

    size = _REFERENCE.itemsize
    (number,) = read(references_at + start * size, size).view(_REFERENCE)["number"].tolist()
    begin = start - number + 1  # the first text of its collection
    if not 0 <= begin <= start:
        return None
    found = read(references_at + begin * size, (stop - begin) * size).view(_REFERENCE)
    numbers, addresses, lengths = (found[name].astype(np.int64) for name in ("number", "address", "length"))
    firsts = np.flatnonzero(numbers == 1)
    if not len(firsts) or firsts[0] != 0 or (lengths > os.fstat(fd).st_size).any():
        return None
    counts = np.diff(firsts, append=len(numbers))
    texts = Texts(np.empty(0, np.uint64), lengths)
    space = HEADER + texts.counts * WORD
    before = np.cumsum(space) - space
    at = addresses + HEADER + before - np.repeat(before[firsts], counts)  # of each text's header
    end, low = int(at[-1] + space[-1]), int(addresses[0])
    apart = (np.diff(addresses[firsts]) < HEADER).any() or (addresses % WORD).any() or (np.diff(at) < HEADER).any()
    if apart or low < 0 or end - low > 2 * (space.sum() + LARGEST * len(firsts)):
        return None
    words, at = read(low, end - low).view(np.uint64), (at - low) // WORD
    alike = (numbers == np.arange(len(numbers)) - np.repeat(firsts, counts) + 1).all()
    alike &= (addresses == np.repeat(addresses[firsts], counts)).all() and (words[at + 1] == lengths).all()
    if not (alike and ((words[at] & np.uint64(0xFFFF)) == numbers).all() and (words[at[firsts] - 2] == _GCOL).all()):
        return None
    own = slice(start - begin, None)
    texts = Texts(words[ranges(at[own] + HEADER // WORD, texts.counts[own])], lengths[own]).padded()
    has_nul = np.count_nonzero(texts.words.view(np.uint8)) != texts.lengths.sum()  # at which HDF5 ends a text
    return None if has_nul else texts


def _move_end(fd: int, before: int, end: int) -> None:
    """Tell the superblock of a closed file, which ended at `before`, that it ends at `end`. Raises OSError."""
    superblock = os.pread(fd, _END_AT + WORD, 0)
    versions, there = superblock[8:16], int.from_bytes(superblock[_END_AT:], "little")
    if versions[0] != 0 or versions[5:7] != bytes([WORD, WORD]) or there != before:
        raise RuntimeError("HDF5 has begun the file in a way that is not known here; this is a bug")
    pwrite_all(fd, memoryview(end.to_bytes(WORD, "little")), _END_AT)


# --- where everything lies -------------------------------------------------------------------------------------------


class Extent(NamedTuple):
    """Where a dataset's rows lie in the file."""

    offset: int
    row_bytes: int
    dtype: np.dtype[Any]
    rows: int


def extents_of(file: h5py.File, path: Path) -> dict[str, Extent]:
    """Every dataset that lies in one piece, by name."""
    extents = {}
    for name, data in datasets_in(file, path):
        offset, shape = data.id.get_offset(), data.shape or (1,)
        if offset is not None or shape[0] == 0:  # HDF5 gives no offset to a dataset without rows
            row = int(np.prod(shape[1:], dtype=np.int64)) * data.dtype.itemsize
            extents[name] = Extent(offset or 0, row, data.dtype, shape[0])
    return extents


def foreign(path: Path, what: str) -> UserError:
    return UserError(f"{path} is refused: {what}.", "A file that virnucpro embed wrote holds all of its rows.")


def datasets_in(file: h5py.File, path: Path) -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset of the file with its name, or each of them. Raises UserError for a link to another place."""
    waiting: list[tuple[str, Any]] = [("", file)]
    seen = 0
    while waiting:
        prefix, group = waiting.pop()
        seen += len(group)
        if seen > schema.MOST_OBJECTS:
            raise damaged(path, f"it has more than {schema.MOST_OBJECTS:,} datasets")
        for key in group:
            name = prefix + key
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise foreign(path, f"{name} is a link to another place")
            item = group[key]
            if isinstance(item, h5py.Dataset):
                yield name, item
            elif isinstance(item, h5py.Group) and name.count("/") < DEPTH - 1:
                waiting.append((f"{name}/", item))
            else:
                raise damaged(path, f"{name} is no dataset")
