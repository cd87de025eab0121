"""What the layouts in HDF5 share: a way to write that HDF5 survives, the provenance in an attribute, a look at what is at the root."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from virnucpro_cli.store import HDF5_MAGIC, blocks
from virnucpro_cli.store.disk import pwrite_all

PROVENANCE = "virnucpro"


class Sink:
    """A new file that HDF5 writes through Python. HDF5 crashes when it closes a file that it could not write.

    So no write fails here: an error, or a signal, is remembered, and writes that follow it go to memory. `each` raises it soon.
    """

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._at = self._size = 0
        self._after: list[tuple[int, bytes]] = []
        self.error: BaseException | None = None
        self.file: Any = None  # the h5py.File

    def each(self, blocks: Iterable[Any]) -> Iterator[Any]:
        """The blocks, as long as all that came of earlier ones is written."""
        for block in blocks:
            yield block
            if self.error is not None:
                raise self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                pwrite_all(self._fd, memoryview(data), self._at)
            except BaseException as error:
                self.error = error
        if self.error is not None:
            self._after.append((self._at, bytes(data)))
        self._at += len(data)
        self._size = max(self._size, self._at)
        return len(data)

    def readinto(self, into: memoryview) -> int:
        """What is in the file, with zeros behind its end, and over it what could not be written."""
        found = bytearray(os.pread(self._fd, len(into), self._at).ljust(len(into), b"\0"))
        for offset, data in self._after:
            first, last = max(offset, self._at), min(offset + len(data), self._at + len(into))
            if first < last:
                found[first - self._at : last - self._at] = data[first - offset : last - offset]
        into[:] = found
        self._at += len(into)
        return len(into)

    def read(self, size: int) -> bytes:
        found = bytearray(size)
        self.readinto(memoryview(found))
        return bytes(found)

    def truncate(self, size: int) -> int:
        self._size = size
        if self.error is None:
            try:
                os.ftruncate(self._fd, size)
            except BaseException as error:
                self.error = error
        return size

    def flush(self) -> None:
        """Everything was written at once."""

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def created(path: Path) -> Iterator[Sink]:
    """A new HDF5 file to write, at `sink.file`. Raises the OSError of a write that failed, once HDF5 has closed the file."""
    sink = Sink(path)
    try:
        with h5py.File(sink, "w") as sink.file:
            yield sink
    finally:
        sink.close()
        if sink.error is not None:
            raise sink.error


def mark(file: h5py.File, provenance: dict[str, Any]) -> None:
    file.attrs[PROVENANCE] = json.dumps(provenance)


def provenance(path: Path) -> dict[str, Any]:
    with h5py.File(path, "r", locking=False) as file:
        return json.loads(file.attrs.get(PROVENANCE, "{}"))


def is_hdf5(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(8) == HDF5_MAGIC


def has(path: Path, *names: str) -> bool:
    """Whether it is an HDF5 file with these at its root, and not one that embed wrote."""
    if not is_hdf5(path):
        return False
    with h5py.File(path, "r", locking=False) as file:
        return "schema" not in file.attrs and all(name in file for name in names)


def texts(data: h5py.Dataset) -> Iterator[str]:
    for block in blocks(len(data)):
        yield from data.asstr()[block].tolist()


def rows(data: h5py.Dataset) -> Iterator[Any]:
    """The rows of [N, ...], read in blocks."""
    step = max(1, (1 << 22) // max(1, data.dtype.itemsize * int(data.shape[-1])))
    for block in blocks(len(data), step):
        yield from data[block]
